"""Quality of samples and completions: likelihood, and Fréchet distance to held-out images.

Writes quality.json and quality.md. Features are those of the model's own middle layer, of another
checkpoint, or of a network in ONNX format (Inception, say). The distance of as many training images
shows what real images reach.
"""

import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from igpt_jax import checkpoint, extras, files
from igpt_jax.config import choices
from igpt_jax.config.fields import Settings
from igpt_jax.data import pipeline
from igpt_jax.data.sources import open_split
from igpt_jax.errors import UserError
from igpt_jax.parallel import hosts, sharding
from igpt_jax.parallel.hosts import say
from igpt_jax.probing.features import FeatureConfig, pooled_features
from igpt_jax.reporting import progress, summary
from igpt_jax.reporting.tables import markdown_table
from igpt_jax.sampling import completer as completer_lib
from igpt_jax.sampling import frechet
from igpt_jax.sampling.completer import NOTHING, Completer, InputImage, prompt_rows
from igpt_jax.workspace import checkpoint_tokens, devices, provenance, watch, weights
from igpt_jax.workspace import workdir as workdir_lib

# Function of at most _PER_PASS images: uint8 [N, H, W, 3] -> features [N, D].
Network = Callable[[np.ndarray], np.ndarray]
_PER_PASS = 128


def run(settings: Settings, workdir: str) -> None:
  """Draws from `checkpoint` (or the workdir's newest) and compares with the test split."""
  watch.run(settings, workdir, "quality.json", quality, depends_on)


def depends_on(settings: Settings) -> dict[str, Any]:
  """Everything that determines quality.json, except the checkpoint."""
  path, network = settings.quality.network, "its own"
  if file := onnx_file(settings):
    network = files.digest_of_file(file)
  elif path:
    network = provenance.of_checkpoint(weights.describe(path, settings))
  return {
    "data": provenance.of_data(settings.data, ["train", "test"]),
    "network": network,
    **provenance.of_settings(
      settings, ["quality", "sample", "seed"],
      without=["quality.network", "sample.batch_size", "sample.scale"],
    ),
  }  # fmt: skip


def quality(settings: Settings, workdir: str, out: str) -> None:
  """Measures one checkpoint; results go to `out`."""
  info = weights.at_resolution(settings, completer_lib.describe(settings, workdir))
  workdir_lib.open_workdir(out)
  mesh = devices.sampling_mesh(settings, info.config)
  splits = {name: open_split(settings.data, name) for name in ("train", "test")}
  for split in splits.values():
    _check_enough(split.fingerprint, len(split))
  n = min(settings.quality.images, *map(len, splits.values()))
  other = describe_network(settings, info)
  completer = Completer(info, settings, mesh)
  reader, resolution = completer.reader, completer.reader.resolution
  network, network_name = open_network(settings, completer, other, mesh)

  def real(name: str) -> np.ndarray:
    """Returns tokens [N, …] of random images of the split."""
    order = np.random.default_rng(settings.seed).permutation(len(splits[name]))[:n]
    chosen = splits[name].select(np.sort(order))
    with progress.doing(f"quality: reading {n:,} images of {name}", say):
      images = np.concatenate(list(pipeline.image_stream(chosen, settings.data, augment=False)))
    _check_enough(f"readable images of {splits[name].fingerprint}", len(images))
    return reader.tokens(images)

  test, train = real("test"), real("train")
  n = len(test)
  rows_given = prompt_rows(settings.sample.keep, resolution)
  held_out = [InputImage(str(i), tokens) for i, tokens in enumerate(test)]
  say(f"quality: {n:,} samples and {n:,} completions beside {splits['test'].fingerprint}")
  nothing, numbers = [NOTHING] * n, np.arange(n)
  samples, of_samples = gather(settings, completer, nothing, numbers, 0, "samples")
  completed, of_completions = gather(
    settings, completer, held_out, 0 * numbers, rows_given, "completions"
  )

  def moments(tokens: np.ndarray) -> frechet.Moments:
    shown = reader.paint(tokens)
    passes = [network(shown[i : i + _PER_PASS]) for i in range(0, len(shown), _PER_PASS)]
    return frechet.moments(np.concatenate(passes))

  with progress.doing("Fréchet statistics of test", say):
    reference = moments(test)

  def distance(tokens: np.ndarray, name: str) -> float:
    with progress.doing(f"Fréchet distance of {name} to test", say):
      return frechet.distance(moments(tokens), reference)

  values = {
    "checkpoint": info.path,
    "step": info.step,
    "parameters": weights.checksum_of(info),
    "network": network_name,
    "pictures": n,
    "data": {name: split.fingerprint for name, split in splits.items()},
    "seed": settings.seed,
    "rows_given": rows_given,
    "samples_distance": distance(samples, "samples"),
    "completions_distance": distance(completed, "completions"),
    "train_distance": distance(train, "train"),
    "samples_nats_per_token": float(of_samples.mean()),
    "completions_nats_per_token": float(of_completions[:, reader.positions(rows_given) :].mean()),
  }
  # Not before: the network runs on the devices of all processes.
  if not hosts.is_main():
    return
  summary.write_text(os.path.join(out, "quality.md"), table(values))
  summary.write_json(os.path.join(out, "quality.json"), values)
  summary.write_summary(out)
  say(table(values).rstrip())


def _check_enough(name: str, n: int) -> None:
  """Raises UserError for fewer than 2 images, which have no covariance."""
  if n < 2:
    raise UserError(f"data: {name}: {n}; a Fréchet distance needs 2 or more; fix: more images")


def gather(
  settings: Settings,
  completer: Completer,
  images: list[InputImage],
  numbers: np.ndarray,
  rows_given: int,
  what: str,
) -> tuple[np.ndarray, np.ndarray]:
  """Draws one sample per image, `sample.batch_size` at a time; returns tokens [N, …] and nats [N, T].

  `numbers` [N] are the numbers of the samples.
  """
  n, size = len(images), min(settings.sample.batch_size, len(images))
  clock = progress.Countdown(what, n, say)
  parts = []
  for first in range(0, n, size):
    # The last batch is as large as the others, so that one program draws them all.
    at = np.minimum(np.arange(first, first + size), n - 1)
    (drawn,) = completer.draw(
      [images[i] for i in at], numbers[at, None], rows_given, choices.sampling_config(settings),
      seed=settings.seed,
    )  # fmt: skip
    parts.append((drawn.tokens[: n - first], drawn.nll[: n - first]))
    clock.tick(min(first + size, n))
  tokens, nll = zip(*parts, strict=True)
  return np.concatenate(tokens), np.concatenate(nll)


def describe_network(
  settings: Settings, info: checkpoint.CheckpointInfo
) -> checkpoint.CheckpointInfo | None:
  """Describes the checkpoint whose features are compared; None for a network in ONNX format.

  Raises:
    UserError: it can't be read, has no such layer, or is of another resolution.
  """
  if onnx_file(settings):
    return None
  path = settings.quality.network
  chosen = weights.describe(path, settings) if path else info
  checkpoint_tokens.check_tokens_known(chosen)
  chosen = weights.at_resolution(settings, chosen, any_kind=True)  # it sees images
  n_layer, layer = chosen.config.n_layer, settings.quality.layer
  if not -1 <= layer <= n_layer:
    raise UserError(
      f"config.quality.layer: {layer}; expected 0 to {n_layer}, or -1 for the middle one"
    )
  return chosen


def onnx_file(settings: Settings) -> str:
  """Returns the path of the network in ONNX format; "" if the network is a checkpoint.

  Raises:
    UserError: there is no such file.
  """
  path = settings.quality.network
  if not path.endswith(".onnx"):
    return ""
  if not os.path.isfile(os.path.expanduser(path)):
    raise UserError(
      f"config.quality.network: {path}: no such file; expected a network in ONNX format"
    )
  return os.path.expanduser(path)


def open_network(
  settings: Settings, completer: Completer, other: checkpoint.CheckpointInfo | None, mesh: Mesh
) -> tuple[Network, str]:
  """Returns the network whose features are compared, and its name."""
  if other is None:
    return onnx_network(onnx_file(settings)), settings.quality.network
  layer = settings.quality.layer if settings.quality.layer >= 0 else other.config.n_layer // 2
  own = other.path == completer.trained.path
  params = completer.trained.params if own else weights.read(other, mesh, say)
  spec = checkpoint_tokens.tokens_of(other)

  def features_of(params, tokens):
    index = np.zeros(len(tokens), np.int32)  # unused without masks
    return pooled_features(other.config, FeatureConfig((layer,)), params, tokens, index)[0]

  extract = jax.jit(features_of, out_shardings=sharding.replicated(mesh))
  per_pass = sharding.round_up_batch(mesh, _PER_PASS)

  def network(images: np.ndarray) -> np.ndarray:
    tokens = spec.encode(sharding.pad_rows(images, per_pass)).astype(np.int32)
    with jax.set_mesh(mesh):
      features = extract(params, sharding.put_global(tokens, mesh))
    return jax.device_get(features)[: len(images)]

  return network, f"layer {layer} of {other.path}"


def onnx_network(path: str) -> Network:
  """Opens a network in ONNX format: float32 [N, 3, H, W] in [-1, 1] -> features [N, …].

  Images are scaled to its input size, if that is fixed.
  """
  try:
    import onnxruntime
  except ImportError:
    raise UserError(
      f"config.quality.network: {path} needs onnxruntime; fix: {extras.install('onnx')}"
    ) from None
  try:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
  except Exception as error:  # onnxruntime's exceptions have no common base class
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
    if side and images.shape[1] != side:
      size, way = (side, side), Image.Resampling.BICUBIC
      scaled = [Image.fromarray(image).resize(size, way) for image in images]
      images = np.stack([np.asarray(image) for image in scaled])
    channels_first = images.transpose(0, 3, 1, 2).astype(np.float32)
    (features, *_) = session.run(None, {first.name: channels_first / np.float32(127.5) - 1})
    return features.reshape(len(features), -1)

  return network


def table(values: dict) -> str:
  """Markdown table of the distances and likelihoods."""

  def row(name: str, key: str) -> tuple[str, str, str]:
    nats = values.get(f"{key}_nats_per_token")
    return name, f"{values[f'{key}_distance']:.4g}", "" if nats is None else f"{nats:.4f}"

  by = f"{values['pictures']:,} images each, by {values['network']}"
  rows = [
    row("samples", "samples"),
    row(f"completions, {values['rows_given']} rows given", "completions"),
    row("training images", "train"),
  ]
  return markdown_table("lrr", (by, "Fréchet distance to test", "nats/token"), rows)
