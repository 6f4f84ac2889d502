"""The table of TPU slices: what exists, and what is said of what doesn't."""

import subprocess
import sys

import pytest

from igpt_jax.errors import UserError
from igpt_jax.parallel import tpu_types


@pytest.mark.parametrize(
  "name, topology, chips, hosts, devices",
  [
    ("v3-32", "v3:4x4", 16, 4, 32),
    ("v4-8", "v4:2x2x1", 4, 1, 4),
    ("v5litepod-1", "v5e:1x1", 1, 1, 1),
    ("v5litepod-8", "v5e:2x4", 8, 1, 8),
    ("v5litepod-16", "v5e:4x4", 16, 4, 16),
    ("v5p-128", "v5p:4x4x4", 64, 16, 64),
    ("v5p-512", "v5p:4x8x8", 256, 64, 256),  # of 4x4x16 and 4x8x8 the more compact
    ("v5p-1536", "v5p:8x8x12", 768, 192, 768),
    ("v6e-256", "v6e:16x16", 256, 64, 256),
    ("tpu7x-64", "tpu7x:2x4x4", 32, 8, 64),
    ("v5p:4x4x16", "v5p:4x4x16", 256, 64, 256),
    ("tpu-v6e-slice:2x4", "v6e:2x4", 8, 1, 8),
  ],
)
def test_what_a_name_asks_for(name, topology, chips, hosts, devices):
  found = tpu_types.find(name, "slice")
  assert (found.topology, found.chips, found.hosts, found.devices) == (
    topology, chips, hosts, devices
  )  # fmt: skip
  twice = tpu_types.find(f"2x{name}", "slice")
  assert (twice.chips, twice.hosts, twice.devices) == (2 * chips, 2 * hosts, devices)
  assert twice.title == f"2×{topology}" and found.title == topology


def test_types_and_topologies_name_each_other():
  for kind in tpu_types.KINDS.values():
    for shape in kind.shapes:
      of_shape = tpu_types.find(f"{kind.name}:{shape}", "slice")
      of_type = tpu_types.find(of_shape.type, "slice")
      assert of_type.chips == of_shape.chips
      sides = [max(map(int, s.split("x"))) for s in (of_type.shape, shape)]
      assert sides[0] <= sides[1]


@pytest.mark.parametrize(
  "name, message",
  [
    ("v5litepod-17", r"slice: 'v5litepod-17': .*nearest: v5litepod-8, v5litepod-16, v5litepod-32$"),
    ("v5p-7", r"nearest: v5p-8, v5p-16, v5p-32$"),
    ("v5p:4x4x5", r"v5p has no slice '4x4x5'; .*nearest: v5p:4x4x4, v5p:4x4x8, v5p:4x4x12; all: 2x2x1"),
    ("tpu-v5p-slice:4x4x5", r"nearest: v5p:4x4x4"),
    ("v6e:4x5", r"nearest: v6e:2x4, v6e:4x4, v6e:4x8; all: 1x1, 2x2, 2x4"),
    ("v5e-16", r"no such TPU; .*did you mean v5litepod-16$"),
    ("v5litepd-16", r"did you mean v5litepod-16$"),
    ("0xv5p-8", r"no such TPU"),
    ("h100", r"no such TPU; expected a type, v2-…, v3-…"),
    ("v5litepod", r"there is no such slice"),
    ("", r"no such TPU"),
  ],
)  # fmt: skip
def test_a_slice_that_there_is_not_is_refused_with_the_nearest(name, message):
  with pytest.raises(UserError, match=message):
    tpu_types.find(name, "slice")


def test_launchers_need_no_jax():
  program = (
    "import sys; from igpt_jax import main; from igpt_jax.workspace import preflight; "
    "heavy = {'jax', 'numpy', 'flax', 'fsspec', 'orbax'} & set(sys.modules); sys.exit(str(heavy) if heavy else 0)"
  )
  done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
  "shape, hosts, vcpus", [("v5e:2x2", 1, 112), ("v5e:2x4", 1, 224), ("v5e:4x4", 4, 112), ("v6e:2x4", 1, 180)]
)  # fmt: skip
@pytest.mark.parametrize("count", [1, 2])
def test_a_host_of_eight_chips_has_cpus_of_its_own_number(shape, hosts, vcpus, count):
  kind, _, shape = shape.partition(":")
  found = tpu_types.Slice(tpu_types.KINDS[kind], shape, count)
  assert (found.hosts, found.vcpus) == (hosts * count, vcpus)
