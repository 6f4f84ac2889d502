"""What is measured of finished runs beside their validation loss: the loss on test, and a linear probe.

Each number is kept in WORKDIR/measured under the digest of what it was made from, so that it is measured
once, wherever the run lies and whatever its name.
"""

import dataclasses
import math
import os
from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh

from igpt_jax import checkpoint, files
from igpt_jax.ablation.outcomes import Result
from igpt_jax.config.fields import Settings, with_values
from igpt_jax.data.sources import open_split
from igpt_jax.parallel import hosts
from igpt_jax.parallel.hosts import say
from igpt_jax.probing import bucket_stores, probe_tables
from igpt_jax.probing import sets as sets_lib
from igpt_jax.reporting import progress, summary
from igpt_jax.workspace import likelihood, provenance, weights

FOLDER = "measured"


def measure(settings: Settings, workdir: str, result: Result, mesh: Mesh | None) -> Result:
  """Returns a finished run's result with the loss on test and the probe's accuracy, as the settings say.

  Args:
    settings: those of job ablate.
    workdir: the job's.
    result: the run's.
    mesh: the mesh to compute on; None: the settings'.
  """
  entry = result.entry
  path = checkpoint.path_of(entry.folder, entry.steps)
  # The run's own data and model; how to measure, and on which devices, is the job's.
  own = dataclasses.replace(
    entry.settings, checkpoint=path, evaluate=settings.evaluate, features=settings.features,
    probe=settings.probe, mesh=settings.mesh,
  )  # fmt: skip
  own = with_values(own, {"features.baselines": (), "features.cache": ""})
  info = weights.describe(path, own)
  if settings.ablate.test:
    made_from = {
      "checkpoint": provenance.of_checkpoint(info),
      "data": provenance.of_data(own.data, ["test"]),
      **provenance.of_settings(own, ["evaluate.images", "evaluate.masks"]),
    }
    values = _kept(workdir, "test", made_from, lambda: {"loss": _test_loss(own, workdir, mesh)})
    result = dataclasses.replace(result, test_loss=values["loss"])
  if settings.ablate.probe == "layers":
    made_from = {
      "checkpoint": provenance.of_checkpoint(info),
      "data": provenance.of_data(own.data, sets_lib.SPLITS),
      **provenance.of_settings(
        own, ["features", "probe.max_iterations"],
        without=["features.batch_size", "features.cache", "features.baselines"],
      ),
    }  # fmt: skip
    values = _kept(workdir, "probe", made_from, lambda: _probe(own, workdir, mesh))
    result = dataclasses.replace(result, probe_accuracy=values["test_accuracy"])
  return result


def _kept(
  workdir: str, what: str, made_from: dict[str, Any], compute: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
  """Returns values that were kept, or computes and keeps them. Collective."""
  path = os.path.join(workdir, FOLDER, f"{what}-{files.digest(made_from)}.json")
  try:
    values = files.read_json(path)
  except FileNotFoundError:
    values = {}
  except ValueError as error:
    say(f"{path} is damaged ({error}): measured again")
    values = {}
  if hosts.on_any(not values, "a look for what is measured"):
    values = compute()
    if hosts.is_main():
      files.make_folder(os.path.dirname(path))
      summary.write_json(path, {"made_from": made_from, **values})
    hosts.wait_for_all("measured")
  return values


def _test_loss(settings: Settings, workdir: str, mesh: Mesh | None) -> float:
  """Evaluates nats per token on test."""
  own, split = settings.evaluate, open_split(settings.data, "test")
  trained, mesh = weights.load_model(settings, workdir, mesh, needs_images=not split.is_tokens)
  return likelihood.nats_per_token(
    trained, split, settings.data, mesh,
    batch_size=own.batch_size, images=own.images, masks=own.masks,
  )  # fmt: skip


def _probe(settings: Settings, workdir: str, mesh: Mesh | None) -> dict[str, Any]:
  """Fits logistic regression to every layer's features; returns the row of the best, by validation."""
  source = sets_lib.open_source(settings, workdir, mesh)
  sets = sets_lib.extract(settings, workdir, source, passing=True)
  if not hosts.is_main():
    return {"test_accuracy": math.nan}
  clock, rows = progress.Countdown("probes", len(sets), say), []
  for done, features in enumerate(sets, 1):
    rows.append(sets_lib.fit(features, source, settings.probe.max_iterations))
    clock.tick(done)
  bucket_stores.forget(sets_lib.folder_of(settings, workdir, source))
  return probe_tables.best_of(rows)
