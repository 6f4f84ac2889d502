"""How good samples and completions are: their likelihood, and their Fréchet distance to held-out pictures.

Writes quality.json and quality.md. Features are those of the model's own middle layer, of another
checkpoint's, or of a network in ONNX format (Inception, say). As many training pictures, which are as
real as test's, say what distance is left when nothing is wrong.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from igpt_jax import checkpoint, files
from igpt_jax.config import choices
from igpt_jax.config.fields import Settings
from igpt_jax.data import pipeline
from igpt_jax.data.palette import Palette
from igpt_jax.data.sources import open_split
from igpt_jax.errors import UserError
from igpt_jax.parallel import hosts, sharding
from igpt_jax.parallel.hosts import say
from igpt_jax.probing.features import FeatureConfig, pooled_features
from igpt_jax.reporting import progress, summary
from igpt_jax.reporting.tables import markdown_table
from igpt_jax.sampling import completer as completer_lib
from igpt_jax.sampling import frechet
from igpt_jax.sampling.completer import NOTHING, Completer, Picture, given_rows
from igpt_jax.workspace import devices, provenance, watch, weights

Network = Callable[[np.ndarray], np.ndarray]  # uint8 [N, H, W, 3] -> features [N, D]

_PER_PASS = 128  # pictures


def run(settings: Settings, workdir: str) -> None:
  """Draws from `checkpoint` (or the workdir's newest) and compares with the test split."""
  watch.run(settings, workdir, "quality.json", quality, depends_on)


def depends_on(settings: Settings) -> dict[str, Any]:
  """All but the checkpoint that decides quality.json."""
  path = os.path.expanduser(settings.quality.network)
  if path.endswith(".onnx"):
    _check_file(settings)
    network = files.digest_of_file(path)
  else:
    network = provenance.of_checkpoint(weights.describe(path, settings)) if path else "its own"
  return {
    "data": provenance.of_data(settings.data, ["train", "test"]),
    "network": network,
    **provenance.of_settings(
      settings, ["quality", "sample", "seed"],
      without=["quality.network", "sample.batch_size", "sample.scale"],
    ),
  }  # fmt: skip


def quality(settings: Settings, workdir: str, out: str) -> None:
  """One checkpoint; results go to `out`."""
  found = completer_lib.describe(settings, workdir)
  weights.check_resolution(settings, found)
  mesh = devices.mesh_of(settings)
  data_config = settings.data
  splits = {name: open_split(data_config, name) for name in ("train", "test")}
  for split in splits.values():
    _check_enough(split.fingerprint, len(split))
  n = min(settings.quality.images, *map(len, splits.values()))
  other = describe_network(settings, found)
  completer = Completer(found, settings, mesh)
  network, called = open_network(settings, completer, other, mesh)

  def real(name: str) -> np.ndarray:
    """Pictures spread over the split, as the palette shows them."""
    order = np.random.default_rng(settings.seed).permutation(len(splits[name]))[:n]
    chosen = splits[name].select(np.sort(order))
    images = np.concatenate(list(pipeline.image_stream(chosen, data_config, augment=False)))
    _check_enough(f"readable images of {splits[name].fingerprint}", len(images))
    return images

  palette, resolution = completer.reader.palette, completer.reader.resolution
  test, train = real("test"), real("train")
  shown = completer.reader.paint(palette.encode(test).reshape(len(test), -1))
  n = len(test)
  rows_given = given_rows(settings.sample.keep, resolution)
  held_out = [
    Picture(str(i), tokens)
    for i, tokens in enumerate(palette.encode(test).reshape(n, -1).astype(np.int32))
  ]
  say(f"quality: {n:,} samples and {n:,} completions beside {splits['test'].fingerprint}")
  samples, of_samples = gather(settings, completer, [NOTHING], range(n), 0, "samples")
  completed, of_completions = gather(
    settings, completer, held_out, range(1), rows_given, "completions"
  )
  reference = frechet.moments(network(shown))

  def distance(pictures: np.ndarray) -> float:
    return frechet.distance(frechet.moments(network(pictures)), reference)

  values = {
    "checkpoint": found.path,
    "step": found.step,
    "parameters": weights.checksum_of(found),
    "network": called,
    "pictures": n,
    "data": {name: split.fingerprint for name, split in splits.items()},
    "seed": settings.seed,
    "rows_given": rows_given,
    "samples_distance": distance(completer.reader.paint(samples)),
    "completions_distance": distance(completer.reader.paint(completed)),
    "train_distance": distance(
      completer.reader.paint(palette.encode(train).reshape(len(train), -1))
    ),
    "samples_nats_per_token": float(of_samples.mean()),
    "completions_nats_per_token": float(of_completions[:, rows_given * resolution :].mean()),
  }
  # Only now: the network runs on the devices of all processes.
  if not hosts.is_main():
    return
  summary.write_text(os.path.join(out, "quality.md"), table(values))
  summary.write_json(os.path.join(out, "quality.json"), values)
  summary.write_summary(out)
  say(table(values).rstrip())


def _check_enough(of: str, n: int) -> None:
  """Raises UserError where images have no covariance."""
  if n < 2:
    raise UserError(f"data: {of}: {n}; a Fréchet distance needs 2 or more; fix: more images")


def gather(
  settings: Settings,
  completer: Completer,
  pictures: list[Picture],
  numbers: range,
  rows_given: int,
  what: str,
) -> tuple[np.ndarray, np.ndarray]:
  """Tokens and nats [N, T] of these samples of these pictures, `sample.batch_size` at a time."""
  batch_size = settings.sample.batch_size
  clock = progress.Countdown(what, len(pictures) * len(numbers), say)
  tokens, nll, done = [], [], 0
  for some, which in _batches(pictures, numbers, batch_size):
    # The last batch is as large as the others, so that one program draws them all.
    (drawn,) = completer.draw(
      some, which, rows_given, choices.sampling_config(settings), seed=settings.seed
    )
    wanted = min(len(drawn.tokens), len(pictures) * len(numbers) - done)
    tokens.append(drawn.tokens[:wanted])
    nll.append(drawn.nll[:wanted])
    done += wanted
    clock.tick(done)
  return np.concatenate(tokens), np.concatenate(nll)


def _batches(pictures, numbers, size: int) -> Iterator[tuple[list[Picture], list[int]]]:
  if len(pictures) == 1:
    size = min(size, len(numbers))
    for first in range(0, len(numbers), size):
      yield pictures, list(range(first, first + size))
    return
  size = min(size, len(pictures))
  for first in range(0, len(pictures), size):
    some = pictures[first : first + size]
    yield some + [some[-1]] * (size - len(some)), list(numbers)


def describe_network(
  settings: Settings, found: checkpoint.Described
) -> checkpoint.Described | None:
  """The checkpoint whose features are compared; None for a network in ONNX format.

  Raises:
    UserError: it can't be read, or has no such layer, or is of another resolution.
  """
  path = settings.quality.network
  if path.endswith(".onnx"):
    _check_file(settings)
    return None
  chosen = weights.describe(path, settings) if path else found
  weights.palette_of(chosen)
  weights.check_resolution(settings, chosen)
  n_layer, layer = chosen.config.n_layer, settings.quality.layer
  if not -1 <= layer <= n_layer:
    raise UserError(
      f"config.quality.layer: {layer}; expected 0 to {n_layer}, or -1 for the middle one"
    )
  return chosen


def _check_file(settings: Settings) -> None:
  path = settings.quality.network
  if not os.path.isfile(os.path.expanduser(path)):
    raise UserError(
      f"config.quality.network: {path}: no such file; expected a network in ONNX format"
    )


def open_network(
  settings: Settings, completer: Completer, other: checkpoint.Described | None, mesh: Mesh
) -> tuple[Network, str]:
  """The features to compare by, and what to call them."""
  if other is None:
    return onnx_network(os.path.expanduser(settings.quality.network)), settings.quality.network
  layer = settings.quality.layer if settings.quality.layer >= 0 else other.config.n_layer // 2
  own = other.path == completer.trained.path
  params = completer.trained.params if own else weights.read(other, mesh, say)
  palette = Palette(np.asarray(other.palette), name=f"palette of {other.path}")
  extract = jax.jit(
    lambda params, tokens: pooled_features(
      other.config, FeatureConfig((layer,)), params, tokens, np.zeros(len(tokens), np.int32)
    )[0],
    out_shardings=sharding.replicated(mesh),
  )
  per_pass = sharding.round_up_batch(mesh, _PER_PASS)

  def network(images: np.ndarray) -> np.ndarray:
    tokens = palette.encode(images).reshape(len(images), -1).astype(np.int32)
    found = []
    with jax.set_mesh(mesh):
      for first in range(0, len(tokens), per_pass):
        some = tokens[first : first + per_pass]
        padded = np.pad(some, ((0, per_pass - len(some)), (0, 0)))
        features = extract(params, sharding.put_global(padded, mesh))
        found.append(jax.device_get(features)[: len(some)])
    return np.concatenate(found)

  return network, f"layer {layer} of {other.path}"


def onnx_network(path: str) -> Network:
  """A network of one's own: float32 [N, 3, H, W] in [-1, 1] to features [N, …].

  Pictures are scaled to the size that it asks for; a network that asks for none gets them as they are.
  """
  try:
    import onnxruntime
  except ImportError:
    raise UserError(
      f"config.quality.network: {path} needs onnxruntime; fix: pip install 'igpt_jax[onnx]'"
    ) from None
  try:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
  except Exception as error:  # of onnxruntime's own kinds
    raise UserError(
      f"config.quality.network: {path} can't be read ({str(error)[:200]!a}); expected a network in ONNX format"
    ) from None
  first = session.get_inputs()[0]
  if len(first.shape) != 4 or first.shape[1] not in (3, "3"):
    raise UserError(
      f"config.quality.network: {path} takes {first.shape}; expected [N, 3, H, W], colours in [-1, 1]"
    )
  side = first.shape[2] if isinstance(first.shape[2], int) else 0

  def network(images: np.ndarray) -> np.ndarray:
    from PIL import Image

    if side and images.shape[1] != side:
      images = np.stack(
        [
          np.asarray(Image.fromarray(each).resize((side, side), Image.Resampling.BICUBIC))
          for each in images
        ]
      )
    found = []
    for start in range(0, len(images), _PER_PASS):
      some = images[start : start + _PER_PASS].transpose(0, 3, 1, 2).astype(np.float32)
      (features, *_) = session.run(None, {first.name: some / np.float32(127.5) - 1})
      found.append(features.reshape(len(features), -1))
    return np.concatenate(found)

  return network


def table(values: dict) -> str:
  """Markdown."""

  def row(name: str, key: str) -> tuple[str, str, str]:
    nats = values.get(f"{key}_nats_per_token")
    return name, f"{values[f'{key}_distance']:.4g}", "" if nats is None else f"{nats:.4f}"

  by = f"{values['pictures']:,} pictures each, by {values['network']}"
  rows = [
    row("samples", "samples"),
    row(f"completions, {values['rows_given']} rows given", "completions"),
    row("training pictures", "train"),
  ]
  return markdown_table("lrr", (by, "Fréchet distance to test", "nats/token"), rows)
