"""A workdir that an early version left in the middle of a run goes on, in every version after it.

tests/frozen/quickstart was written by 2abf26f on one CPU device: the quickstart, small, stopped at step
40 of 80. tests/frozen/quickstart.json tells what 2abf26f read there, and how it went on. What doesn't
hold bit for bit, and is known:

- Another kind of machine, version of jax or set of XLA flags computes other last digits: from step 50
  on metrics are the recorded ones within 1e-5, and parameters at step 80 are compared bit for bit only
  where all three are those of a record. Seen: with XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type=
  the gradient norm of step 80 is 0.45383146, without it 0.45383129; losses are the same to 7 digits.
- Times, and so images_per_second, eta_seconds and data_wait, are the machine's.
"""

import hashlib
import json
import os
import pathlib
import platform
import shutil

import jax
import numpy as np
import pytest

from igpt_jax import checkpoint, files
from igpt_jax.checkpoint import Checkpoints
from igpt_jax.config import choices
from igpt_jax.config.fields import as_json
from igpt_jax.data.palette import Palette
from igpt_jax.data.sources import open_split
from igpt_jax.parallel.sharding import make_mesh
from igpt_jax.reporting import metrics
from igpt_jax.runner import data_order
from igpt_jax.tokens import TokenSpec
from igpt_jax.training import optimizer, state
from igpt_jax.workspace import provenance, workdir
from support.frozen import FROZEN, SETTINGS, config_of
from support.quickstart import call

RECORD = json.loads(FROZEN.with_suffix(".json").read_text())
EXACT = ("loss", "validation_loss", "grad_norm", "learning_rate")


def mesh():
  return make_mesh(devices=jax.devices()[:1])


def sums_of(tree) -> dict[str, str]:
  """SHA-256 of each array's dtype, shape and numbers, by its place in the tree."""
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {jax.tree_util.keystr(path): sum_of(leaf) for path, leaf in leaves}


def sum_of(leaf) -> str:
  array = np.asarray(leaf)
  what = f"{array.dtype.name} {array.shape} ".encode() + array.tobytes()
  return hashlib.sha256(what).hexdigest()[:16]


def sum_of_all(tree) -> str:
  return sum_of(np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(tree)]))


def state_at(folder, step):
  config = config_of()
  found = checkpoint.describe(str(folder / "checkpoints" / str(step)))
  tx = optimizer.make_optimizer(choices.optimizer_config(config))
  abstract = state.abstract_state(found.config, tx)
  checkpoints = Checkpoints(str(folder))
  restored = checkpoints.restore(step, abstract, state.state_shardings(found.config, tx, mesh()))
  checkpoints.close()
  return restored


def order_from(folder, step, batches) -> list[list[int]]:
  config = config_of()
  data = config.data
  order = data_order.DataOrder(
    str(folder), open_split(data, "train"), batch_size=config.train.batch_size, seed=config.seed
  )
  palette = Palette.load(str(folder / "palette.npy"))
  spec = TokenSpec(n_vocab=palette.size, palette=palette)
  with order.batches(step, data, spec, mesh()) as stream:
    return [next(stream)["index"].tolist() for _ in range(batches)]


def surroundings() -> dict[str, str]:
  """What last digits depend on."""
  told = pathlib.Path("/proc/cpuinfo")
  lines = told.read_text(encoding="utf-8").split("\n\n")[0].split("\n") if told.exists() else []
  cpu = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
  kind = [cpu.get(name, "unknown") for name in ("model name", "cpu family", "model")]
  return {
    "machine": ", ".join([platform.machine(), *kind]),
    "jax": jax.__version__,
    "xla_flags": os.environ.get("XLA_FLAGS", ""),
  }


@pytest.fixture
def frozen(tmp_path):
  return pathlib.Path(shutil.copytree(FROZEN, tmp_path / "frozen"))


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
  """Two copies that went on, as a person has them go on."""
  workdirs = []
  for name in ("one", "other"):
    workdirs.append(pathlib.Path(shutil.copytree(FROZEN, tmp_path_factory.mktemp(name) / "run")))
    flags = [f"--config.{field}={value}" for field, value in SETTINGS.items()]
    done = call("configs/quickstart.py", workdirs[-1], *flags)
    assert done.returncode == 0, done.stderr
    assert "resuming at step 40 of 80" in done.stdout
  return workdirs


def test_its_settings_are_todays():
  """A field that came later needs its default in history.ADDED, one that went or moved an entry in
  history.RENAMED: without them no older workdir would go on."""
  changed_since = {"mesh.fsdp": 1}  # defaults that are others now: it keeps its own
  assert workdir.read(str(FROZEN)) == files.flatten(as_json(config_of())) | changed_since


def test_results_that_earlier_versions_kept_are_found(frozen):
  """They are known by the digest of the checkpoint's provenance: this is what 6fe437e took."""
  info = checkpoint.describe(str(frozen / "checkpoints" / "40"))
  assert files.digest(provenance.of_checkpoint(info)) == "71264c13a333d017"


def test_its_state_and_its_data_are_read_as_they_were_written(frozen):
  at = state_at(frozen, 40)
  tree = {"params": at.params, "opt_state": at.opt_state, "step": at.step, "rng": at.rng}
  assert sums_of(tree) == RECORD["state_at_40"]
  order = order_from(frozen, 40, 40)
  assert order[0] == RECORD["order_from_40"]["first"]
  assert sum_of(np.asarray(order)) == RECORD["order_from_40"]["sha256"]


def test_it_goes_on_to_the_recorded_numbers(resumed):
  lines = (FROZEN / "metrics.jsonl").read_text()
  for folder in resumed:
    assert (folder / "metrics.jsonl").read_text().startswith(lines)
    found = {}
    for record in metrics.read_jsonl(folder / "metrics.jsonl"):
      if record["step"] > 40:
        exact = {name: value for name, value in record.items() if name in EXACT}
        found.setdefault(str(record["step"]), {}).update(exact)
    assert found.keys() == RECORD["metrics"].keys()
    for step, values in RECORD["metrics"].items():
      # The last learning rate is 0.002 of the first, by a cosine that versions of jax round differently.
      assert found[step] == pytest.approx(values, rel=1e-5, abs=1e-9), step
    assert json.loads((folder / "training.json").read_text())["step"] == 80


def test_two_of_it_go_on_alike_and_as_recorded_where_last_digits_are(resumed):
  one, other = (state_at(folder, 80) for folder in resumed)
  assert sums_of(one) == sums_of(other)
  here = surroundings()
  for record in RECORD["params_at_80"]:
    if all(record[name] == value for name, value in here.items()):
      assert sum_of_all(one.params) == record["sha256"]
