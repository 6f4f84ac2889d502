"""Completes a person's own images, or draws unconditional samples.

OUT is the workdir, or complete/ in it where it holds checkpoints:

  OUT/[CLASS/]grid.png              a row per image: prompt, samples …, original
  OUT/[CLASS/]IMAGE/0000.png …    the samples
  OUT/[CLASS/]IMAGE/appearing.gif their pixels appearing (not of a BERT model's)
  OUT/[CLASS/]IMAGE/complete.json seeds, nats per token
  OUT/[CLASS/]IMAGE/0000.npz …    tokens and nats of a batch's samples
  OUT/settings.json                 what determines the samples: the model's checksum, how they are drawn
  OUT/complete.json                 the same, and a summary of all images

Each batch is written before the next is drawn, and isn't drawn again: its file holds digests of the
settings and of the image.
"""

import collections
import dataclasses
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from igpt_jax import checkpoint, files, units
from igpt_jax.config import choices
from igpt_jax.config.fields import Settings
from igpt_jax.data.image_decoding import BadRecord
from igpt_jax.errors import UserError
from igpt_jax.parallel import hosts
from igpt_jax.parallel.hosts import say
from igpt_jax.reporting import figures, progress, summary
from igpt_jax.sampling import completer as completer_lib
from igpt_jax.sampling import filler, prompt_files
from igpt_jax.sampling.completer import NOTHING, Completer, InputImage, Reader, prompt_rows
from igpt_jax.sampling.filler import Filler
from igpt_jax.sampling.prompt_files import File
from igpt_jax.workspace import devices, memory, provenance, weights
from igpt_jax.workspace import workdir as workdir_lib

_GRID_ROWS = 64  # images in a grid
_GRID_SAMPLES = 16  # samples of each in a grid
_GRID_DRAWN = 256  # unconditional samples in a grid
_SETTINGS = "settings.json"
# Errors of reading an archive that is damaged or isn't one of ours.
_DAMAGED = (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile, zlib.error)


@dataclasses.dataclass(eq=False)
class Target:
  """An image to complete, and its samples."""

  file: File | None  # None: unconditional samples
  image: InputImage
  folder: str  # folder of its results
  settings: str  # digest of everything but the image that determines its samples
  # number -> (tokens [T, …], nats [T])
  samples: dict[int, tuple[np.ndarray, np.ndarray]] = dataclasses.field(default_factory=dict)

  def read(self) -> None:
    """Reads samples that were drawn before for this image with these settings."""
    for name in files.names(self.folder):
      if not name.endswith(".npz"):
        continue
      try:
        with (
          files.opened(os.path.join(self.folder, name)) as file,
          np.load(file, allow_pickle=False) as part,
        ):
          if self._is_of(part):
            rows = zip(part["numbers"], part["tokens"], part["nll"], strict=True)
            self.samples |= {int(number): (tokens, nll) for number, tokens, nll in rows}
      except _DAMAGED:
        continue  # drawn again

  def _is_of(self, part: Mapping[str, np.ndarray]) -> bool:
    same_image = int(part["identity"]) == self.image.identity
    return same_image and str(part["settings"]) == self.settings

  def add(self, numbers: list[int], tokens: np.ndarray, nll: np.ndarray) -> None:
    """Adds samples, and writes them to disk."""
    path = os.path.join(self.folder, f"{numbers[0]:04d}.npz")
    with files.replacing(path) as partial, open(partial, "wb") as file:
      np.savez(
        file,
        identity=np.uint32(self.image.identity),
        settings=np.asarray(self.settings),
        numbers=np.asarray(numbers),
        tokens=tokens.astype(np.uint16),
        nll=nll,
      )
    self.samples |= {n: (tokens[i], nll[i]) for i, n in enumerate(numbers)}


def run(settings: Settings, workdir: str) -> None:
  """Completes `images`, or draws `n` images, with `checkpoint`."""
  devices.use_cores(settings)
  settings = weights.or_packaged(settings, workdir)
  info = completer_lib.describe(settings, workdir, bert=True)
  known = filler.known_pixels(settings, info)
  n, images = settings.complete.n, settings.complete.images
  chosen = prompt_files.find(images) if images else []
  mesh = devices.sampling_mesh(settings, info.config, n)
  if info.config.causal:
    memory.check_cache(info.config, settings.sample.batch_size, settings.sample.cache, mesh)
  in_run = checkpoint.latest_step(workdir) is not None
  out = os.path.join(workdir, "complete") if in_run else workdir
  recipe = _recipe(settings, info, known)
  _check_same(recipe, out)
  workdir_lib.open_workdir(out)
  reader = Reader(info)
  targets, unreadable = _targets(chosen, reader, out, files.digest(recipe))
  for target in targets:
    target.read()
  # No process draws before all have read the samples on disk.
  hosts.wait_for_all("complete")
  if hosts.is_main():
    summary.write_json(os.path.join(out, _SETTINGS), recipe)

  to_do = [target for target in targets if _missing(target, n)]
  before = len(targets) - len(to_do)
  what = units.counted(n, "sample")
  if chosen:
    what += f" each of {units.counted(len(targets), 'image')}"
  given = f", {known.mean():.0%} of each given" if chosen else ""
  say(f"complete: {what}{given}" + (f"; {before} done before" if chosen and before else ""))
  if to_do:
    completer = filler.open_model(info, settings, mesh)
    # A list, made before drawing: only the main process's targets get the samples that are drawn.
    batches = list(_batches(to_do, n, settings.sample.batch_size))
    clock = progress.Countdown("batches", len(batches), say)
    for done, (batch, numbers) in enumerate(batches, 1):
      _draw(completer, batch, numbers, recipe, settings)
      for target in dict.fromkeys(batch):
        if hosts.is_main() and not _missing(target, n):
          _finish(target, reader, recipe, settings)
      clock.tick(done)
  if not hosts.is_main():
    return
  for target in targets:
    if not _is_finished(target, recipe):
      _finish(target, reader, recipe, settings)
  values = {"checkpoint": info.path, "step": info.step}
  values |= _write_grids(targets, reader, info, recipe, out, settings)
  if unreadable:
    values["unreadable"] = unreadable
  summary.write_json(os.path.join(out, "complete.json"), values)
  for message in unreadable:
    say(f"left out: {message}")
  say(f"mean {values['nats_per_token']:.4f} nats/token; wrote {out}")


def _recipe(
  settings: Settings, info: checkpoint.CheckpointInfo, known: np.ndarray
) -> dict[str, Any]:
  """Everything but the image that determines its samples."""
  sampling, complete = choices.sampling_config(settings), settings.complete
  resolution = info.run["resolution"]
  return {
    **provenance.of_checkpoint(info),
    "resolution": resolution,
    "dtype": choices.compute_dtype(settings),
    "cache": settings.sample.cache,
    "rows_given": prompt_rows(complete.keep, resolution) if complete.images else 0,
    # Given pixels as rows of 0 and 1; none for unconditional samples.
    "known": ["".join(str(int(pixel)) for pixel in row) for row in known & bool(complete.images)],
    **({} if info.config.causal else {"passes": complete.passes}),
    "n": complete.n,
    "seed": settings.seed,
    "scale": settings.sample.scale or figures.default_scale(resolution),
    **dataclasses.asdict(sampling),
  }


def _check_same(recipe: dict[str, Any], out: str) -> None:
  """Raises UserError if `out` holds samples drawn in another way, or by another model."""
  try:
    stored = files.read_json(os.path.join(out, _SETTINGS))
  except FileNotFoundError:
    return
  except (OSError, ValueError) as error:
    raise UserError(
      f"workdir: {out}/{_SETTINGS} is damaged ({error}); fix: another --workdir"
    ) from None
  what = f"{out} holds samples that were drawn in another way, or by another model"
  files.check_same("workdir", what, stored, recipe, f"another --workdir, or remove {out}")


def _targets(
  chosen: list[File], reader: Reader, out: str, recipe: str
) -> tuple[list[Target], list[str]]:
  """Reads the images; returns them, and messages about those that can't be read.

  Raises:
    UserError: none can be read.
  """
  if not chosen:
    return [Target(None, NOTHING, os.path.join(out, NOTHING.name), recipe)], []
  targets, unreadable = [], []
  for file in chosen:
    try:
      with files.opened(file.path) as stream:
        image = reader.read(stream.read(), file.path)
    except OSError as error:
      unreadable.append(f"{file.path}: {error.strerror}")
    except BadRecord as error:
      unreadable.append(str(error))
    else:
      targets.append(Target(file, image, os.path.join(out, file.group, file.name), recipe))
  if not targets:
    reasons = "\n  ".join(unreadable[:5])
    raise UserError(
      f"config.complete.images: none can be read:\n  {reasons}\nexpected JPEG, PNG, …"
    )
  for message in unreadable:
    say(f"unreadable, left out: {message}")
  return targets, unreadable


def _missing(target: Target, n: int) -> list[int]:
  return [number for number in range(n) if number not in target.samples]


def _batches(
  targets: list[Target], n: int, batch_size: int
) -> Iterator[tuple[list[Target], list[int]]]:
  """Yields images and numbers of their samples, all batches of one shape.

  For that the last numbers may exceed n, and a group's last image may be repeated.
  """
  size, most = completer_lib.batch_shape(n, batch_size)
  together = min(most, len(targets))
  for start in range(0, len(targets), together):
    group = targets[start : start + together]
    for first in range(0, n, size):
      numbers = list(range(first, first + size))
      if any(number in _missing(target, n) for target in group for number in numbers):
        yield group + [group[-1]] * (together - len(group)), numbers


def _draw(
  completer: Completer | Filler, batch: list[Target], numbers: list[int], recipe, settings: Settings
) -> None:
  """Draws a batch and writes it to disk."""
  images, sampling = [target.image for target in batch], choices.sampling_config(settings)
  *_, drawn = filler.draw(completer, images, numbers, _known(recipe), sampling, seed=settings.seed)
  if not hosts.is_main():
    return
  kept = [number for number in numbers if number < settings.complete.n]
  for i, target in enumerate(batch):
    if target in batch[:i]:
      break  # the last one repeated, which pads the batch
    rows = slice(i * len(numbers), i * len(numbers) + len(kept))
    scale = recipe["scale"]
    files.make_folder(target.folder)
    for number, painted in zip(kept, completer.reader.paint(drawn.tokens[rows]), strict=True):
      path = os.path.join(target.folder, f"{number:04d}.png")
      figures.save_png(path, figures.grid([[painted]], scale=scale, gap=0))
    # Last, since samples in the archive aren't drawn again.
    target.add(kept, drawn.tokens[rows], drawn.nll[rows])


def _rows(target: Target, n: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns the first n samples' tokens [n, T, …] and nats [n, T]."""
  tokens, nll = zip(*(target.samples[number] for number in range(n)), strict=True)
  return np.stack(tokens), np.stack(nll)


def _is_finished(target: Target, recipe: dict[str, Any]) -> bool:
  try:
    kept = files.read_json(os.path.join(target.folder, "complete.json"))
  except (OSError, ValueError):
    return False
  ours = {"picture_identity": target.image.identity, "settings": recipe}
  return not files.differing(kept, ours)


def _finish(target: Target, reader: Reader, recipe: dict[str, Any], settings: Settings) -> None:
  """Writes the animation, then the JSON, of an image whose samples are all drawn."""
  tokens, nll = _rows(target, settings.complete.n)
  if "passes" not in recipe:  # a BERT model doesn't draw in raster order
    n_given = recipe["rows_given"] * recipe["resolution"]
    images = list(reader.paint(tokens[:_GRID_SAMPLES]))
    frames = figures.appearing(images, n_given, columns=4, scale=recipe["scale"])
    figures.save_gif(os.path.join(target.folder, "appearing.gif"), frames)
  nats = nll[:, reader.spec.of_pixels(~_known(recipe))].mean(1)
  values = {
    "picture": target.file.path if target.file else None,
    "picture_identity": target.image.identity,
    "settings": recipe,
    "nats_per_token": float(nats.mean()),
    "samples": [
      {
        "file": f"{number:04d}.png",
        # jax.random.key(seed), with identity and number folded in.
        "seed": [recipe["seed"], target.image.identity, number],
        "nats_per_token": round(float(nats[number]), 5),
      }
      for number in range(settings.complete.n)
    ],
  }
  summary.write_json(os.path.join(target.folder, "complete.json"), values)


def _known(recipe: dict[str, Any]) -> np.ndarray:
  """Returns the mask of given pixels, bool [H, W]."""
  return np.array([[pixel == "1" for pixel in row] for row in recipe["known"]])


def _write_grids(
  targets: list[Target],
  reader: Reader,
  info: checkpoint.CheckpointInfo,
  recipe: dict[str, Any],
  out: str,
  settings: Settings,
) -> dict[str, Any]:
  """Writes a grid for each class; returns the content of complete.json."""
  groups = collections.defaultdict(list)
  for target in targets:
    groups[target.file.group if target.file else ""].append(target)
  known, nats_of = _known(recipe), {}
  hidden = reader.spec.of_pixels(~known)
  by = figures.checkpoint_name(info.path, info.step)
  for group, members in groups.items():
    for target in members:
      _, nll = _rows(target, settings.complete.n)
      nats_of[os.path.relpath(target.folder, out)] = float(nll[:, hidden].mean())
    grid = _grid(members, reader, known, by, settings)
    figures.save_png(os.path.join(out, group, "grid.png"), grid)
    if len(members) > _GRID_ROWS:
      say(f"{os.path.join(out, group, 'grid.png')} shows the first {_GRID_ROWS} images")
  return {
    "settings": recipe,
    "pictures": len(nats_of) if known.any() else 0,
    "nats_per_token": float(np.mean(list(nats_of.values()))),
    "each_nats_per_token": {name: round(nats, 5) for name, nats in nats_of.items()},
  }


def _grid(
  targets: list[Target], reader: Reader, known: np.ndarray, by: str, settings: Settings
) -> np.ndarray:
  """Paints completions of a class, or unconditional samples; `by` names the checkpoint."""
  n, scale = settings.complete.n, settings.sample.scale
  if targets[0].file is None:
    drawn = reader.paint(_rows(targets[0], n)[0][:_GRID_DRAWN])
    return figures.samples(drawn, scale=scale, title=f"Samples, {by}")
  completed = [
    (reader.paint(target.image.tokens[None])[0], list(reader.paint(_rows(target, n)[0][:_GRID_SAMPLES])))
    for target in targets[:_GRID_ROWS]
  ]  # fmt: skip
  return figures.completions(known, completed, scale=scale, title=f"Completions, {by}")
