"""Table of the forecasts in a workdir: which model fits on which slice, at what speed.

Job compile adds a row when it runs, or replaces that of the same model, resolution, slice and batch.
"""

import dataclasses
import math
import os
from typing import Any

from igpt_jax import files, units
from igpt_jax.errors import UserError
from igpt_jax.model.model_config import PRESETS, ImageGPTConfig
from igpt_jax.parallel.sharding import MESH_AXES
from igpt_jax.reporting import summary
from igpt_jax.reporting.tables import markdown_table

_FILE = "scale.json"
# Where docs/scale.md has job compile write.
WORKDIR = os.path.join("runs", "scale")

# Rows that come with the program, the figures of docs/scale.md: model; slice; batch, a slice's mesh, seconds of a step.
_CARRIED: tuple[tuple[str, str, int, tuple[int, int, int], float], ...] = (
  ("iGPT-S 32²", "v5e:4x4", 128, (2, 8, 1), 0.04936),
  ("iGPT-S 32²", "v5e:4x4", 256, (2, 8, 1), 0.0906),
  ("iGPT-S 32²", "2×v5e:4x4", 128, (1, 16, 1), 0.0287),
  ("iGPT-S 32²", "v5p:2x2x4", 128, (2, 8, 1), 0.0253),
  ("iGPT-S 32²", "v5p:2x2x4", 256, (2, 8, 1), 0.04451),
  ("iGPT-S 32²", "v6e:4x4", 128, (2, 8, 1), 0.0132),
  ("iGPT-S 32²", "v6e:4x4", 256, (2, 8, 1), 0.02227),
  ("iGPT-S 32²", "2×v6e:4x4", 128, (1, 16, 1), 0.00948),
  ("iGPT-S 32²", "tpu7x:2x2x2", 128, (2, 8, 1), 0.00833),
  ("iGPT-M 32²", "v5e:4x4", 128, (2, 8, 1), 0.20251),
  ("iGPT-M 32²", "v5e:4x4", 256, (2, 8, 1), 0.3693),
  ("iGPT-M 32²", "v5p:2x2x4", 128, (2, 8, 1), 0.1014),
  ("iGPT-M 32²", "v5p:2x2x4", 256, (2, 8, 1), 0.1767),
  ("iGPT-M 32²", "v6e:4x4", 128, (2, 8, 1), 0.0591),
  ("iGPT-M 32²", "v6e:4x4", 256, (2, 8, 1), 0.09576),
  ("iGPT-M 32²", "tpu7x:2x2x2", 128, (2, 8, 1), 0.03664),
  ("iGPT-L 32²", "v5e:4x4", 128, (2, 8, 1), 0.5409),
  ("iGPT-L 32²", "2×v5e:4x4", 128, (1, 16, 1), 0.3003),
  ("iGPT-L 32²", "v5p:2x2x4", 128, (2, 8, 1), 0.26651),
  ("iGPT-L 32²", "v5p:2x2x4", 256, (2, 8, 1), 0.4861),
  ("iGPT-L 32²", "v6e:4x4", 128, (2, 8, 1), 0.1642),
  ("iGPT-L 32²", "v6e:4x4", 256, (2, 8, 1), 0.28104),
  ("iGPT-L 32²", "2×v6e:4x4", 128, (1, 16, 1), 0.11644),
  ("iGPT-L 32²", "tpu7x:2x2x2", 128, (2, 8, 1), 0.13734),
  ("iGPT-L 48²", "v5e:8x8", 128, (4, 16, 1), 0.3820),
  ("iGPT-L 48²", "v5p:2x4x4", 128, (2, 16, 1), 0.2937),
  ("iGPT-L 48²", "v6e:4x4", 128, (2, 8, 1), 0.33593),
  ("iGPT-XL 64²", "v5e:16x16", 256, (8, 32, 1), 1.6482),
  ("iGPT-XL 64²", "v5p:4x4x4", 64, (2, 32, 1), 0.6341),
  ("iGPT-XL 64²", "v5p:4x4x4", 256, (2, 32, 1), 2.2956),
  ("iGPT-XL 64²", "v6e:16x16", 256, (8, 32, 1), 0.477),
  ("iGPT-XL 64²", "tpu7x:4x4x4", 256, (4, 32, 1), 0.62389),
)

_HEAD = (
  "model", "slice", "chips", "data × fsdp × tensor", "batch", "remat", "fits: GiB a chip", "step",
  "MFU", "images/s", "days", "chip-hours",
)  # fmt: skip
_NETWORK = "between slices, a chip and step"


def add(workdir: str, values: dict[str, Any]) -> None:
  """Adds the values of compile.json to scale.json and scale.md.

  Raises:
    UserError: scale.json is damaged.
  """
  path, new = os.path.join(workdir, _FILE), _row(values)
  rows = {_key(row): row for row in (*read(workdir).values(), new)}
  summary.write_json(path, rows)
  summary.write_text(os.path.join(workdir, "scale.md"), markdown(rows))


def read(workdir: str) -> dict[str, Any]:
  """Returns the rows of a workdir's table; {} if it has none.

  Raises:
    UserError: scale.json is damaged.
  """
  path = os.path.join(workdir, _FILE)
  try:
    return files.read_json(path)
  except FileNotFoundError:
    return {}
  except ValueError as error:
    raise UserError(f"workdir: {path} is damaged ({error}); fix: remove it") from None


@dataclasses.dataclass(frozen=True)
class Known:
  """A forecast of a model's training step on a slice.

  Attributes:
    batch_size: images in its batch.
    mesh: its mesh within a slice, (data, fsdp, tensor).
    step_seconds: seconds of its step.
    source: where it is from.
  """

  batch_size: int
  mesh: tuple[int, ...]
  step_seconds: float
  source: str


def known(name: str, topology: str, batch_size: int, mesh: tuple[int, ...]) -> Known | None:
  """Returns the forecast of the nearest batch, of those the same mesh's, or one in WORKDIR; None: there is none.

  Args:
    name: by `name_of`.
    topology: the slice's, such as "v5e:4x4"; of several, "2×v5e:4x4".
    batch_size: images in a batch.
    mesh: a slice's mesh.

  Raises:
    UserError: the table in WORKDIR is damaged.
  """
  own = [
    Known(
      row["batch_size"],
      tuple(row["mesh"][axis] for axis in MESH_AXES),
      row["step_seconds"],
      os.path.join(WORKDIR, _FILE),
    )
    for row in read(WORKDIR).values()
    if (row["name"], _slices(row)) == (name, topology) and "step_seconds" in row
  ]
  carried = [
    Known(batch, mesh, seconds, "docs/scale.md")
    for model, slices, batch, mesh, seconds in _CARRIED
    if (model, slices) == (name, topology)
  ]

  def distance(row: Known) -> tuple[float, bool]:
    return abs(math.log(row.batch_size / batch_size)), row.mesh != mesh

  return min(own + carried, key=distance, default=None)


def name_of(values: dict[str, Any]) -> str:
  """Returns the name of compile.json's model, such as "iGPT-L 48²", and what isn't the paper's."""
  model = values["model"]
  name = f"{model['n_layer']} layers of {model['n_embd']}"
  for size, preset in PRESETS.items():
    if all(getattr(preset, field) == model[field] for field in ("n_layer", "n_embd", "n_head")):
      name = f"iGPT-{size.upper()}"
  bert = " BERT" if values["objective"] == "masked" else ""
  config = ImageGPTConfig(**model)
  options, spec = config.options, config.tokens
  chosen = [value if isinstance(value, str) else option for option, value in options.items()]
  if not spec.needs_palette:
    chosen.insert(0, spec.kind)
  if values.get("optimizer", "adam") != "adam":
    chosen.append(values["optimizer"])
  others = f" ({', '.join(chosen)})" if chosen else ""
  return f"{name}{bert} {spec.side(config.n_positions)}²{others}"


def _key(row: dict[str, Any]) -> str:
  """Returns what a row is known by; older versions' files have others."""
  return f"{row['name']}, {_slices(row)}, batch {row['batch_size']}"


def _slices(values: dict[str, Any]) -> str:
  """The slice's name, and how many of it: "2×v5e:4x4"."""
  several = f"{values['slices']}×" if values.get("slices", 1) > 1 else ""
  return several + values["topology"]


def _row(values: dict[str, Any]) -> dict[str, Any]:
  kept = (
    "topology", "slices", "chips", "mesh", "batch_size", "accumulate", "remat", "fits", "bytes_per_chip",
    "hbm_bytes", "step_seconds", "mfu", "images_per_second", "days", "chip_hours", "between_slices",
  )  # fmt: skip
  return {"name": name_of(values)} | {key: values[key] for key in kept if key in values}


def markdown(rows: dict[str, Any]) -> str:
  several = any("between_slices" in row for row in rows.values())
  alignment, head = "llrlrllrrrrr" + "l" * several, _HEAD + (_NETWORK,) * several
  cells = [_cells(row) + (_network(row),) * several for row in rows.values()]
  return markdown_table(alignment, head, cells)


def _network(row: dict[str, Any]) -> str:
  """What crosses the network between slices, "85.7 MB, 27.4 ms, 26.1 ms hidden"; "" for one slice."""
  if "between_slices" not in row:
    return ""
  network = row["between_slices"]
  hidden = network["seconds"] - network["seconds_not_hidden"]
  sent = units.data_size(network["bytes_sent_per_chip"])
  return f"{sent}, {1e3 * network['seconds']:.1f} ms, {1e3 * hidden:.1f} ms hidden"


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
  mesh = " × ".join(str(row["mesh"][axis]) for axis in MESH_AXES)
  memory = f"{row['bytes_per_chip'] / 2**30:.1f} of {row['hbm_bytes'] / 2**30:.1f}"
  start = (
    row["name"], _slices(row), row["chips"], mesh, f"{row['batch_size']:,}", row["remat"],
    f"{'yes' if row['fits'] else 'no'}: {memory}",
  )  # fmt: skip
  if "step_seconds" not in row:
    return *start, *[""] * 5
  return (
    *start, f"{1e3 * row['step_seconds']:,.0f} ms", f"{row['mfu']:.1%}",
    f"{row['images_per_second']:,.0f}", f"{row['days']:.2f}", f"{row['chip_hours']:,.0f}",
  )  # fmt: skip
