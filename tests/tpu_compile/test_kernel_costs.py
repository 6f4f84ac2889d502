"""What a kernel that only copies costs on TPUs that aren't here: its bytes over the memory's bandwidth."""

import json

import pytest

from igpt_jax.parallel import hardware
from support import tpu_copy
from support.tpu_job import NEEDS_LIBTPU, run_support

pytestmark = [pytest.mark.tpu_compile, NEEDS_LIBTPU]


@pytest.mark.parametrize("name", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_a_copy_takes_the_time_of_its_bytes(name):
  told = json.loads(run_support("tpu_copy", name).stdout)
  assert told["moved"] == tpu_copy.MOVED == 2 * 8192 * 1024 * 4
  (chip,) = {c for c in hardware.CHIPS.values() if c.name == name.partition(":")[0]}
  assert told["seconds"] == pytest.approx(tpu_copy.MOVED / chip.hbm_bandwidth)
  bundles, matmuls = told["step"]
  # Its code alone, by which it would be several times too fast.
  assert bundles > 0 == matmuls
  assert told["seconds"] > 3 * told["seconds_of_code"] > 0
