"""All layers' linear probes, by igpt_jax's logistic regression and by scikit-learn's, layer by layer.

  python tests/benchmarks/probe_sklearn.py --json probe_sklearn.json

Both sides do what the probe does: for each layer, fit every strength to the training rows, choose by
accuracy on the validation rows, fit the chosen one again with those folded in, and test once. Both
start from the same float32 features. Seconds of igpt_jax include compiling.

Features are those of --features, an .npz of `features` [layers, rows, width] and `labels` [rows]; or
drawn: class centres and noise with a decaying spectrum, turned and scaled, with about half of the
rows told right. `--sklearn-layers n` times scikit-learn on n layers alone and scales its seconds up.
On a machine that does other work, its threads wait for each other: give `--sklearn-threads 1`, and
compare CPU seconds.
"""

import argparse
import contextlib
import importlib.metadata
import itertools
import json
import os
import pathlib
import platform
import sys
import time
import warnings

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import jax
import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from igpt_jax.probing import logistic
from igpt_jax.probing.linear import STRENGTHS

MAX_ITERATIONS = 1_000


def drawn_layer(layer: int, layers: int, labels: np.ndarray, width: int) -> np.ndarray:
  """Features [N, width]; the middle layers tell classes best."""
  rng = np.random.default_rng(layer)
  spectrum = np.arange(1, width + 1) ** -1.0
  turn = np.linalg.qr(rng.standard_normal((width, width)))[0]
  depth = layer / max(layers - 1, 1)
  apart = (1.0 + 0.8 * np.sin(np.pi * depth)) / np.sqrt(width)
  centres = apart * rng.standard_normal((labels.max() + 1, width))
  latent = rng.standard_normal((len(labels), width)) + centres[labels]
  scales = np.exp(rng.standard_normal(width))
  return ((latent * spectrum) @ turn * scales + rng.standard_normal(width)).astype(np.float32)


def by_igpt_jax(train, validation, test, n_classes):
  settings = dict(n_classes=n_classes, max_iterations=MAX_ITERATIONS)
  fits = logistic.fit(*train, STRENGTHS, **settings)
  scores = fits.accuracy(*validation).tolist()
  best = int(np.argmax(scores))
  last = logistic.fit(*folded(train, validation), [STRENGTHS[best]], **settings)
  iterations = [*fits.iterations.tolist(), *last.iterations.tolist()]
  converged = bool(fits.converged.all() and last.converged.all())
  return STRENGTHS[best], scores, float(last.accuracy(*test)[0]), iterations, converged


def by_sklearn(train, validation, test, n_classes):
  del n_classes
  iterations = []

  def fit(part, strength):
    model = make_pipeline(
      StandardScaler(), LogisticRegression(C=strength, max_iter=MAX_ITERATIONS)
    ).fit(*part)
    iterations.append(int(model[-1].n_iter_[0]))
    return model

  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always", ConvergenceWarning)
    scores = [float(fit(train, strength).score(*validation)) for strength in STRENGTHS]
    best = int(np.argmax(scores))
    score = fit(folded(train, validation), STRENGTHS[best]).score(*test)
  converged = not any(issubclass(each.category, ConvergenceWarning) for each in caught)
  return STRENGTHS[best], scores, float(score), iterations, converged


def folded(train, validation):
  return tuple(np.concatenate(pair) for pair in zip(train, validation, strict=True))


def timed(probe, splits, n_classes) -> dict:
  wall, processor = time.perf_counter(), time.process_time()
  strength, scores, accuracy, iterations, converged = probe(*splits, n_classes)
  return {
    "seconds": time.perf_counter() - wall,
    "cpu_seconds": time.process_time() - processor,
    "validation_accuracies": scores,
    "strength": strength,
    "test_accuracy": accuracy,
    "iterations": iterations,
    "converged": converged,
  }


def processor() -> str:
  for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
    if line.startswith("model name"):
      return line.split(":", 1)[1].strip()
  return platform.processor()


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--pictures", type=int, default=50_000, help="train and validation")
  parser.add_argument("--validation", type=int, default=5_000)
  parser.add_argument("--test", type=int, default=10_000)
  parser.add_argument("--width", type=int, default=256)
  parser.add_argument("--layers", type=int, default=13)
  parser.add_argument("--classes", type=int, default=10)
  parser.add_argument("--features", help=".npz to read instead of drawing features")
  parser.add_argument("--sklearn-layers", type=int, help="how many it is timed on; default: all")
  parser.add_argument("--sklearn-threads", type=int, help="default: its own choice")
  parser.add_argument("--json", help="file to write the figures to")
  options = parser.parse_args()

  if options.features:
    with np.load(options.features, allow_pickle=False) as file:
      given, labels = file["features"], file["labels"]
    layers, n_classes = len(given), int(labels.max()) + 1
    needed = options.pictures + options.test
    if len(labels) < needed:
      parser.error(f"{options.features} has {len(labels)} rows; expected {needed} or more")
  else:
    layers, n_classes = options.layers, options.classes
    labels = np.random.default_rng(99).integers(n_classes, size=options.pictures + options.test)
  sklearn_layers = layers if options.sklearn_layers is None else options.sklearn_layers
  # Spread over the layers, whose problems aren't equally hard.
  compared = set(np.linspace(0, layers - 1, sklearn_layers + 2)[1:-1].round().astype(int).tolist())
  if sklearn_layers >= layers:
    compared = set(range(layers))

  bounds = [options.pictures - options.validation, options.pictures]
  ends = [0, *bounds, options.pictures + options.test]
  ours, theirs = {}, {}
  load = os.getloadavg()
  for layer in range(layers):
    features = (
      given[layer] if options.features else drawn_layer(layer, layers, labels, options.width)
    )
    splits = [(features[start:end], labels[start:end]) for start, end in itertools.pairwise(ends)]
    ours[layer] = timed(by_igpt_jax, splits, n_classes)
    print(f"layer {layer} igpt_jax     {ours[layer]}", flush=True)
    if layer in compared:
      limited = options.sklearn_threads is not None
      with threadpool_limits(options.sklearn_threads) if limited else contextlib.nullcontext():
        theirs[layer] = timed(by_sklearn, splits, n_classes)
      print(f"layer {layer} scikit-learn {theirs[layer]}", flush=True)

  def total(side, what):
    return sum(layer[what] for layer in side.values())

  names = ("jax", "scikit-learn", "numpy", "scipy")
  versions = {name: importlib.metadata.version(name) for name in names}
  scaled = layers / len(theirs) if theirs else float("nan")
  result = {
    "machine": f"{processor()}, {os.cpu_count()} cores, jax on {jax.default_backend()}",
    "load_before_and_after": [load, os.getloadavg()],
    "versions": {"python": platform.python_version(), **versions},
    "problem": f"{options.pictures} × {features.shape[1]} × {layers} layers × {len(STRENGTHS)} strengths",
    "layers_timed_by_sklearn": sorted(theirs),
    "threads_of_sklearn": options.sklearn_threads or "its own choice",
  }
  for what in ("seconds", "cpu_seconds"):
    result[what] = {"igpt_jax": total(ours, what), "scikit-learn": scaled * total(theirs, what)}
    result[what]["ratio"] = result[what]["scikit-learn"] / result[what]["igpt_jax"]
  for what in ("test_accuracy", "validation_accuracies"):
    result[f"largest_difference_of_{what}"] = max(
      (float(np.abs(np.subtract(ours[at][what], theirs[at][what])).max()) for at in theirs),
      default=float("nan"),
    )
  if len(theirs) < layers:
    print(f"scikit-learn was timed on {len(theirs)} of {layers} layers; its seconds are scaled up")
  print(json.dumps(result, indent=2))
  if options.json:
    layerwise = {"igpt_jax": ours, "scikit-learn": theirs}
    pathlib.Path(options.json).write_text(json.dumps({**result, "by_layer": layerwise}, indent=2))


if __name__ == "__main__":
  main()
