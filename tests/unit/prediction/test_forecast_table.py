"""The table of forecasts: a row for every model, slice and optimizer."""

import dataclasses
import json
import re

import pytest

from igpt_jax.model.model_config import PRESETS, ImageGPTConfig
from igpt_jax.prediction import forecast_table
from support.paths import ROOT


def values_of(optimizer="adam", **options):
  shape = {name: getattr(PRESETS["s"], name) for name in ("n_layer", "n_head", "n_embd")}
  return {
    "model": dataclasses.asdict(ImageGPTConfig(**shape, **options)),
    "objective": "autoregressive", "optimizer": optimizer, "topology": "v5e:4x4", "chips": 16,
    "mesh": {"data": 16, "fsdp": 1, "tensor": 1}, "batch_size": 128, "accumulate": 1,
    "remat": "names", "fits": False, "bytes_per_chip": 2**30, "hbm_bytes": 2**31,
  }  # fmt: skip


@pytest.mark.parametrize(
  "made, name",
  [
    ({}, "iGPT-S 32²"),
    ({"optimizer": "muon"}, "iGPT-S 32² (muon)"),
    (
      {"positions": "rope2d", "value_embeddings": True, "optimizer": "muon"},
      "iGPT-S 32² (rope2d, value_embeddings, muon)",
    ),
  ],
)
def test_a_name_tells_what_is_not_the_papers(made, name):
  assert forecast_table.name_of(values_of(**made)) == name


def test_another_recipe_or_batch_has_a_row_of_its_own(tmp_path):
  larger = values_of() | {"batch_size": 256}
  for values in (values_of(), values_of("muon"), larger, values_of()):
    forecast_table.add(str(tmp_path), values)
  rows = json.loads((tmp_path / "scale.json").read_text())
  assert list(rows) == [
    "iGPT-S 32², v5e:4x4, batch 128", "iGPT-S 32² (muon), v5e:4x4, batch 128",
    "iGPT-S 32², v5e:4x4, batch 256",
  ]  # fmt: skip
  # A row of an older version, whose key had no batch, is replaced all the same.
  older = {"iGPT-S 32², v5e:4x4": rows.pop("iGPT-S 32², v5e:4x4, batch 128")} | rows
  (tmp_path / "scale.json").write_text(json.dumps(older))
  forecast_table.add(str(tmp_path), values_of() | {"remat": "full"})
  now = json.loads((tmp_path / "scale.json").read_text())
  assert [(key, row["remat"]) for key, row in now.items()] == [
    ("iGPT-S 32², v5e:4x4, batch 128", "full"), *((key, "names") for key in rows)
  ]  # fmt: skip
  assert "iGPT-S 32² (muon)" in (tmp_path / "scale.md").read_text()


def test_a_forecast_of_ones_own_goes_before_the_carried_one(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "runs" / "scale").mkdir(parents=True)

  def known(batch_size, mesh=(16, 1, 1), topology="v5e:4x4"):
    return forecast_table.known("iGPT-S 32²", topology, batch_size, mesh)

  assert known(128).source == "docs/scale.md"
  assert known(128, topology="3×v5e:4x4") is None
  forecast_table.add("runs/scale", values_of())  # doesn't fit: no time
  assert known(128).source == "docs/scale.md"
  timed = values_of() | {"step_seconds": 0.5, "mfu": 0.5, "images_per_second": 2.0}
  forecast_table.add("runs/scale", timed | {"days": 1.0, "chip_hours": 1.0})
  own = known(128)
  assert own == forecast_table.Known(128, (16, 1, 1), 0.5, "runs/scale/scale.json")
  # The nearest batch counts more than who has made it, and of those the same mesh.
  assert known(1_024).batch_size == 256
  assert known(150) == own == known(128, (4, 4, 1))
  assert known(128, (2, 8, 1)).source == "docs/scale.md"


def test_the_carried_forecasts_are_those_of_the_page():
  """Each is a row of a table in docs/scale.md: its slice, and its step in whole or tenths of milliseconds."""
  page = (ROOT / "docs" / "scale.md").read_text()
  for name, topology, batch, mesh, seconds in forecast_table._CARRIED:
    several, _, size = topology.rpartition("×")
    shape, step = " × ".join(map(str, mesh)), f"{1e3 * seconds:,.0f}"
    model, slices, cells = name, topology, rf"\d+ \| {shape} \| {batch:,} \|.*\| "
    if several:
      model, slices = f"`imagenet32_{name[5].lower()}`", f"{several} × {size}"
      step, cells = f"{1e3 * seconds:,.1f}", ""
    row = re.compile(rf"^\| {model} \| {slices} \| {cells}{step} ms \|", re.MULTILINE)
    assert row.search(page), (name, topology, batch, seconds)


def test_slices_have_a_row_of_their_own_with_what_crosses_between_them(tmp_path):
  forecast_table.add(str(tmp_path), values_of())
  assert "between slices" not in (tmp_path / "scale.md").read_text()
  mesh = {"slice": 2, "data": 16, "fsdp": 1, "tensor": 1}
  network = {"bytes_sent_per_chip": 19.2e6, "seconds": 6.2e-3, "seconds_not_hidden": 0.2e-3}
  several = {"slices": 2, "mesh": mesh, "chips": 32, "between_slices": network}
  forecast_table.add(str(tmp_path), values_of() | several)
  assert list(json.loads((tmp_path / "scale.json").read_text())) == [
    "iGPT-S 32², v5e:4x4, batch 128", "iGPT-S 32², 2×v5e:4x4, batch 128"
  ]  # fmt: skip
  head, _, one, two = (tmp_path / "scale.md").read_text().splitlines()
  assert head.endswith("| between slices, a chip and step |") and one.endswith("|  |")
  assert "| 2×v5e:4x4 | 32 | 16 × 1 × 1 |" in two
  assert two.endswith("| 19.2 MB, 6.2 ms, 6.0 ms hidden |")
