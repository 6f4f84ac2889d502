"""Pretraining on a mesh that is chosen: the numbers of one device, a record of it, and other meshes afterwards."""

import jax
import numpy as np
import pytest

from igpt_jax import checkpoint
from igpt_jax.jobs import evaluate, pretrain
from igpt_jax.reporting import metrics
from igpt_jax.training import arrangement
from igpt_jax.workspace import workdir as workdir_lib
from support import tiny
from support.quickstart import params_of, shrunk, stop_at

pytestmark = pytest.mark.usefixtures("quick_compile")


def losses(workdir):
  records = metrics.read_jsonl(workdir / "metrics.jsonl")
  return {record["step"]: record["loss"] for record in records if "loss" in record}


def meshes(workdir):
  """Returns the mesh that each checkpoint was made on, by its step."""
  paths = {n: checkpoint.path_of(str(workdir), n) for n in checkpoint.whole_steps(str(workdir))}
  return {n: tuple(checkpoint.describe(path).run["mesh"].values()) for n, path in paths.items()}


def test_a_chosen_mesh_is_recorded_and_decides_nothing(tiny_run, tmp_path, monkeypatch):
  """CPUs are given a rule: the run begins on 4 × 2 × 1, and goes on where the rule chooses 1 × 8 × 1."""
  tiny.mesh_of((8, 1, 1))
  settings = shrunk()
  monkeypatch.setattr(arrangement, "fsdp", lambda model, *sizes: 2)
  with pytest.MonkeyPatch.context() as patch:
    stop_at(patch, 6)
    pretrain.run(settings, str(tmp_path))
  assert meshes(tmp_path)[6] == (4, 2, 1)
  # config.json is what was asked for, so that another machine chooses for itself.
  assert workdir_lib.read(str(tmp_path))["mesh.fsdp"] == 0
  monkeypatch.setattr(arrangement, "fsdp", lambda model, *sizes: 8)
  pretrain.run(settings, str(tmp_path))
  last = max(meshes(tmp_path))
  assert last > 6 and meshes(tmp_path)[last] == (1, 8, 1)
  found, expected = losses(tmp_path), losses(tiny_run)
  assert list(found) == list(expected)
  np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-4),
    params_of(tmp_path),
    params_of(tiny_run),
  )


def test_a_reading_job_has_a_mesh_for_the_checkpoints_model(tiny_run, tmp_path, monkeypatch):
  """Whatever model the settings would make."""
  tiny.mesh_of((8, 1, 1))
  widths, meshes = [], []
  evaluator = evaluate.LikelihoodEvaluator

  def rule(model, *sizes):
    widths.append(model.n_embd)
    return 4

  def of(model, objective, mesh):
    meshes.append(mesh)
    return evaluator(model, objective, mesh)

  monkeypatch.setattr(arrangement, "fsdp", rule)
  monkeypatch.setattr(evaluate, "LikelihoodEvaluator", of)
  settings = {"checkpoint": str(tiny_run), "model.n_embd": 0, "evaluate.images": 8}
  evaluate.run(shrunk(**settings), str(tmp_path))
  assert widths == [16] and tuple(meshes[0].shape.values()) == (2, 4, 1)
