"""What a study says of its runs: exponents told or refused, seeds' noise, what isn't fitted, and its pages."""

import dataclasses
import json
import math

import numpy as np
import pytest

from igpt_jax.ablation import outcomes
from igpt_jax.ablation.entries import Entry
from igpt_jax.ablation.outcomes import FINISHED, Result
from igpt_jax.config import choices
from igpt_jax.isoflop import config_file, findings, grid, pictures, report
from igpt_jax.isoflop.findings import HeldOut, Run
from igpt_jax.isoflop.frontier import Estimate
from igpt_jax.isoflop.ladder import LADDER, Costs
from igpt_jax.isoflop.surface import Surface
from support.quickstart import load_config
from support.tiny import changed, settings_of

IMAGES = 45_000
TRUTH = Surface(1.7, 9.0, 45.0, 0.28, 0.30)


@pytest.fixture(scope="module")
def settings():
  return settings_of(load_config("isoflop_cifar10_16"), {"isoflop.draws": 40})


@pytest.fixture(scope="module")
def costs(settings):
  return Costs(settings, 64)


def run_of(settings, costs, shape, budget, seed, **changes):
  cell = grid.cell(settings, costs, shape, budget, IMAGES)
  own = costs.settings(shape, cell.steps, seed)
  model = choices.model_config(own, n_vocab=64)
  entry = Entry(name=shape.name, seed=seed, settings=own, folder=f"{budget}", model=model)
  return Run(cell=cell, entry=entry, n=costs.size(shape), **changes)


def study(settings, costs, *, off=0):
  """Five shapes at each budget, around the known surface's optimum or `off` rungs from it."""
  runs = []
  for budget in settings.isoflop.budgets:
    n = np.geomspace(1e3, 1e6, 5_000)
    best = n[TRUTH.loss(n, budget / costs.flops_per_token(n)).argmin()]
    middle = grid.nearest(LADDER, costs, best) + off
    for i in range(middle - 2, middle + 3):
      for seed in (0, 1, 2) if i == middle else (0,):
        runs.append(run_of(settings, costs, LADDER[i], budget, seed))
  return runs


@pytest.fixture
def losses(monkeypatch):
  """Has runs come to the known surface's losses, and 0.005 more or less by their seed."""

  def result_of(entry):
    run = losses.by_entry[id(entry)]
    loss = TRUTH.loss(run.n, run.cell.tokens) + (0.0, 0.005, -0.005)[entry.seed]
    return Result(entry=entry, status=FINISHED, validation_loss=float(loss), train_loss=float(loss))

  def known(runs):
    losses.by_entry = {id(run.entry): run for run in runs}
    return runs

  losses = known
  monkeypatch.setattr(outcomes, "result_of", result_of)
  return known


def test_exponents_are_told_where_slices_hold_their_minima(settings, costs, losses):
  found = findings.find(settings, costs, IMAGES, losses(study(settings, costs)))
  assert [parabola.inside for parabola in found.parabolas] == [True] * 4
  a, b = found.exponents
  assert a.value + b.value == pytest.approx(1, abs=0.08)  # more, or less, as FLOPs a parameter fall
  assert a.low < a.value < a.high and found.refusal == ""
  assert found.seed_noise == pytest.approx(0.005)
  assert [optimum.budget for optimum in found.optima] == [
    *settings.isoflop.budgets,
    3e13,
    1e14,
    1e15,
  ]


def test_they_are_refused_where_minima_lie_outside(settings, costs, losses):
  settings = changed(settings, {"isoflop.budgets": (1e13, 3e13, 1e14), "isoflop.held_out": 0.0})
  found = findings.find(settings, costs, IMAGES, losses(study(settings, costs, off=-3)))
  assert found.exponents is None
  assert "at 0 of 3 budgets (none); 3 are needed" in found.refusal
  assert "no exponent is told" in report.markdown(found)


def test_what_is_held_out_or_unfinished_is_not_fitted(settings, costs, losses, monkeypatch):
  runs = losses(study(settings, costs))
  runs[0] = dataclasses.replace(runs[0], held_out=True)
  results, unfinished = outcomes.result_of, id(runs[5].entry)

  def result_of(entry):
    if id(entry) == unfinished:
      return Result(entry=entry, status="diverged at step 7")
    return results(entry)

  monkeypatch.setattr(outcomes, "result_of", result_of)
  found = findings.find(settings, costs, IMAGES, losses(runs))
  assert len(found.fitted) == len(runs) - 2 == len(found.fit.residuals)
  few = findings.find(settings, costs, IMAGES, losses(runs[1:6]))
  assert few.fit is None and "Too few runs have finished" in report.markdown(few)


def test_the_pages(settings, costs, losses, tmp_path):
  runs = losses(study(settings, costs))
  held = run_of(settings, costs, LADDER[7], 3e13, 0, held_out=True)
  loss = float(TRUTH.loss(held.n, held.cell.tokens))
  forecast = HeldOut(held.cell, Estimate(loss + 0.01, loss - 0.02, loss + 0.03), loss)
  found = findings.find(settings, costs, IMAGES, losses([*runs, held]), forecast)
  report.write(str(tmp_path), found)
  values = json.loads((tmp_path / report.NUMBERS).read_text())
  assert values["held_out"]["inside"] and values["fitted_runs"] == len(runs)
  for optimum in values["frontier"][:5]:
    assert optimum["n"]["low"] < optimum["n"]["value"] < optimum["n"]["high"]
  text = (tmp_path / report.PAGE).read_text()
  assert "within the interval, -0.0100 from the forecast" in text and "N* ∝ C^a with a = " in text
  half = dataclasses.replace(
    found.optima[0], n=Estimate(4e4, 1e4, math.nan), d=Estimate(3e6, math.nan, 9e6)
  )
  unsure = dataclasses.replace(found, optima=(half,))
  told = "40,000 (10,000 to out of range) | 3 (out of range to 9) | 75 (out of range to 900)"
  assert told in report.markdown(unsure)
  assert report.numbers(unsure)["frontier"][0]["d"] == {"value": 3e6, "low": None, "high": 9e6}
  far = dataclasses.replace(found.optima[-1], budget=1e20, n=None, d=None, loss=None)
  text = report.markdown(dataclasses.replace(found, optima=(*found.optima, far)))
  assert f"| 1e20 | {' | '.join(['out of range'] * 7)} |" in text
  rows = (tmp_path / report.RUNS).read_text().splitlines()
  assert len(rows) == 1 + len(runs) + 1 and rows[0].startswith("budget,fitted,shape,n_layer")


def test_bands_end_where_sizes_are_out_of_range(settings, costs, losses, tmp_path, monkeypatch):
  found = findings.find(settings, costs, IMAGES, losses(study(settings, costs)))
  least, most = found.frontier.range
  far = 3e3 * most  # every other draw expects its optimum there
  monkeypatch.setattr(
    found.frontier,
    "sizes",
    lambda surface, budget: np.array([1e4] if surface is found.fit.surface else [1e4, far]),
  )
  panels = []
  monkeypatch.setattr(pictures.plots, "plot", lambda path, *drawn, **_: panels.extend(drawn))
  pictures._frontier("frontier.png", found)
  low, high = panels[0].curves["surface"].band
  assert min(low) >= least and max(high) == pytest.approx(most)


def test_what_the_page_says_of_a_run_held_out(settings, costs):
  cell = grid.cell(settings, costs, LADDER[7], 3e13, IMAGES)
  empty = findings.Findings(settings=settings, costs=costs, images=IMAGES, runs=())
  for reached, inside, said in (
    (2.45, True, "Reached: 2.4500, within the interval, -0.0500 from the forecast"),
    (2.65, False, "Reached: 2.6500, **outside** the interval by 0.0500, +0.1500 from the forecast"),
    (math.nan, False, "It hasn't finished."),
  ):
    held = HeldOut(cell, Estimate(2.5, 2.4, 2.6), reached)
    assert held.inside == inside
    assert said in report._held_out(dataclasses.replace(empty, held_out=held))


def test_a_written_config_is_the_settings(settings, costs):
  run = run_of(settings, costs, LADDER[7], 3e13, 5)
  text = config_file.text(
    run.entry.settings, HeldOut(run.cell, Estimate(2.5, 2.4, 2.6)), 'a"""b\\c/isoflop_3e13.py'
  )
  scope = {}
  exec(compile(text, "written", "exec"), scope)
  assert settings_of(scope["get_config"]()) == run.entry.settings
  assert "90% interval 2.4000 to 2.6000" in scope["__doc__"]
