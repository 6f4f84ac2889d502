"""A study from its first run to its last: budgets in their order, each planned by what the ones before found.

  WORKDIR/isoflop/SHAPE/SEED/BUDGET is a pretraining's workdir

The runs of one shape and seed share a trunk: that of a larger budget begins as a copy of the smaller one's,
at the checkpoint that its decay began from, and is bit for bit the run that began at step 0. What is planned
follows from finished runs alone, so that a study that was killed goes on as if it hadn't been.
"""

import dataclasses
import itertools
import os
from collections.abc import Sequence

from jax.sharding import Mesh

from igpt_jax import checkpoint, files, units
from igpt_jax.ablation import entries, sequence
from igpt_jax.ablation.comparison import flop_unit
from igpt_jax.ablation.entries import Entry
from igpt_jax.config.fields import Settings, with_values
from igpt_jax.errors import UserError
from igpt_jax.isoflop import config_file, findings, grid, report
from igpt_jax.isoflop.findings import Findings, HeldOut, Run, trunk_ends
from igpt_jax.isoflop.frontier import BEYOND, Estimate
from igpt_jax.isoflop.grid import Cell, compact
from igpt_jax.isoflop.ladder import Costs, Shape, rungs
from igpt_jax.isoflop.speeds import Speeds
from igpt_jax.parallel import hosts
from igpt_jax.parallel.hosts import say
from igpt_jax.reporting import progress
from igpt_jax.reporting.tables import markdown_table
from igpt_jax.workspace import branches

FOLDER = "isoflop"


class Study:
  """A study in its workdir, which the caller has locked.

  Args:
    settings: of job isoflop.
    workdir: the job's.
    mesh: the mesh to train on; None: each run's own.

  Raises:
    UserError: a budget can't be spent as the settings ask, or data or palette aren't as they must be.
  """

  def __init__(self, settings: Settings, workdir: str, mesh: Mesh | None):
    self._rungs = rungs(settings.isoflop.shapes)
    self._shared = entries.opened(settings, workdir)
    self._settings, self._workdir, self._mesh = settings, workdir, mesh
    self._images, self._own = len(self._shared.train), settings.isoflop
    self.costs = Costs(self._settings, self._shared.n_vocab)
    self._runs: list[Run] = []
    self._held_out: HeldOut | None = None
    self._speeds = Speeds(self.costs)
    self._told_before = report.number_of_runs(workdir)
    self._expected = {budget: self._cells(budget) for budget in self._own.budgets}
    for name in ("held_out", "budget"):  # refused now, not when all budgets have been trained
      if budget := getattr(self._own, name):
        self._best_cell(budget, self._expected_size(budget), f"isoflop.{name}")
    for budget in self._own.budgets:  # those that have ended, by which the next ones are planned
      self._add(budget)
      if not all(run.result.ended for run in self._runs):
        break
    entries.keep_palette(self._shared, workdir, FOLDER)

  def plan(self) -> str:
    """Returns a table of the budgets with the shapes that are expected, and a forecast of the time of all.

    If nothing has been trained yet, some steps of the smallest and of the largest shape are timed for it.
    """
    unit, name = flop_unit(max(self._own.budgets))
    planned = {budget: self._planned(budget) for budget in self._budgets()}
    rows = [
      (
        compact(budget), f"{cells[0].shape.name} to {cells[-1].shape.name}",
        f"{self.costs.size(cells[0].shape):,} to {self.costs.size(cells[-1].shape):,}",
        f"{cells[0].steps:,} to {cells[-1].steps:,}", f"{cells[0].epochs:.2f} to {cells[-1].epochs:.2f}",
        f"{sum(each.flops for each in planned[budget]) / unit:.3g}",
      )
      for budget, cells in self._expected.items()
    ]  # fmt: skip
    head = ("budget", "shapes", "parameters without tables", "steps", "epochs", name)
    runs = list(itertools.chain(*planned.values()))
    self._measure()
    left = sum(self._speeds.seconds(each.shape, each.flops) for each in runs if not each.ended)
    seconds = progress.format_seconds(left)
    slowest, fastest = (units.significant(speed / 1e9) for speed in self._speeds.range())
    held = f", and a run of {compact(self._own.held_out)} FLOPs" if self._own.held_out else ""
    return (
      f"{markdown_table('llrrrr', head, rows)}as expected; from the second budget on by what has been found{held}: "
      f"{sum(each.flops for each in runs) / unit:.3g} {name} in all; {seconds} for what hasn't ended, at {slowest} to "
      f"{fastest} GFLOP/s as measured here, without compiling and evaluations"
    )

  def train(self) -> str | None:
    """Trains what isn't trained yet; returns the signal that stopped it, None: all is trained."""
    budgets = self._budgets()
    added = {run.cell.budget for run in self._runs}
    for i, budget in enumerate(self._own.budgets):
      if budget not in added:
        self._add(budget)
      if stopped_by := self._train(budgets[i + 1 :]):
        return stopped_by
    return self._train_held_out() if self._own.held_out else None

  def others(self) -> list[str]:
    """Returns the folders of runs that are no part of this plan, such as those of an earlier one."""
    shapes = os.path.join(self._workdir, FOLDER)
    folders = [shapes]
    for _ in range(3):
      folders = [os.path.join(folder, name) for folder in folders for name in files.names(folder)]
    planned = {run.entry.folder for run in self._runs}
    return [folder for folder in folders if folder not in planned]

  def report(self) -> Findings:
    """Fits what has finished, and writes all results."""
    found = findings.find(self._settings, self.costs, self._images, self._runs, self._reached())
    if hosts.is_main():
      report.write(self._workdir, found)
    hosts.wait_for_all("report written")
    return found

  def write_config(self, budget: float, found: Findings, name: str = "isoflop.budget") -> HeldOut:
    """Writes WORKDIR/isoflop_BUDGET.py, the config of the best run at a budget; returns its forecast.

    Raises:
      UserError: the best size is out of range, or the budget can't be spent on its shape.
    """
    forecast = self._forecast(budget, found, name)
    self._warn(forecast.cell)
    path = os.path.join(self._workdir, config_file.name_of(budget))
    own = self.costs.settings(forecast.cell.shape, forecast.cell.steps, self._own.seeds[0])
    own = with_values(own, {"palette.path": self._shared.palette_path})
    if hosts.is_main():
      config_file.write(path, own, forecast)
    low, high = forecast.forecast.low, forecast.forecast.high
    say(
      f"isoflop: {path}: {forecast.cell.shape.name}, {forecast.cell.steps:,} steps; forecast "
      f"{forecast.forecast.value:.4f} ({low:.4f} to {high:.4f}) nats per token"
    )
    return forecast

  # --- planning ------------------------------------------------------------------------------------

  def _budgets(self) -> list[float]:
    """Returns all budgets in the order in which they are spent."""
    return [*self._own.budgets, *([self._own.held_out] if self._own.held_out else [])]

  def _planned(self, budget: float) -> list["_Planned"]:
    """Returns the runs of a budget, planned or as they are expected so far."""
    if budget == self._own.held_out:
      cell = self._best_cell(budget, self._expected_size(budget), "isoflop.held_out")
      return [self._expect(cell, self._own.seeds[0])]
    before = max((each for each in self._own.budgets if each < budget), default=0.0)
    trunks = {cell.shape: cell for cell in self._expected.get(before, ())}
    cells = self._expected[budget]
    return [
      *(self._expect(cell, self._own.seeds[0], trunks.get(cell.shape)) for cell in cells),
      *(self._expect(grid.middle(cells), seed) for seed in self._own.seeds[1:]),
    ]

  def _expect(self, cell: Cell, seed: int, shared: Cell | None = None) -> "_Planned":
    """Returns an expected run, which may go on from the trunk of a smaller budget's."""
    flops = cell.flops
    if shared:
      own = self.costs.settings(shared.shape, shared.steps, seed)
      flops -= trunk_ends(own) * shared.flops_per_step
    return _Planned(cell.shape, flops, self._run(cell, seed).result.ended)

  def _measure(self) -> None:
    """Learns from finished runs how fast shapes train here, or times some steps."""
    for run in self._runs:
      self._speeds.note(run.cell.shape, run.result.step_seconds)
    cells = [cell for of in self._expected.values() for cell in of]
    shapes = sorted({cell.shape for cell in cells}, key=self.costs.size)
    self._speeds.measure((shapes[0], shapes[-1]), self._mesh)

  def _cells(self, budget: float) -> list[Cell]:
    """Returns the shapes that a budget trains, the smallest first."""
    size = self._expected_size(budget)
    shapes = grid.window(self._rungs, self.costs, size, self._own.per_budget)
    return [self._cell(shape, budget) for shape in shapes]

  def _expected_size(self, budget: float) -> float:
    """Returns the best N at a budget by what has been trained, or as the settings expect."""
    points = findings.points_of([(run, run.result) for run in self._runs])
    return grid.expected_size(budget, points, self.costs, self._own.tokens_per_parameter)

  def _cell(self, shape: Shape, budget: float, name: str = "isoflop.budgets") -> Cell:
    return grid.cell(self._settings, self.costs, shape, budget, self._images, name)

  def _best_cell(self, budget: float, size: float, name: str) -> Cell:
    """Returns a budget spent on that shape of the whole ladder whose N is nearest to a size."""
    return self._cell(grid.best_shape(self.costs, size), budget, name)

  def _add(self, budget: float) -> None:
    """Plans the runs of a budget: every shape with the first seed, the middle one with all."""
    cells = self._expected[budget] = self._cells(budget)
    for cell in cells:
      self._warn(cell)
      for seed in self._own.seeds if cell is grid.middle(cells) else self._own.seeds[:1]:
        self._runs.append(self._run(cell, seed))

  def _warn(self, cell: Cell) -> None:
    """Says if a run has more epochs than repeated images are good for."""
    if cell.epochs > self._own.max_epochs:
      say(
        f"isoflop: {cell.shape.name} at {compact(cell.budget)}: {cell.epochs:.1f} epochs of {self._images:,} images, "
        f"more than isoflop.max_epochs = {self._own.max_epochs:g}: repeated images are worth less than new ones"
      )

  def _run(self, cell: Cell, seed: int, held_out: bool = False) -> Run:
    """Returns a planned run, once its folder has been found to be free, or its own."""
    parts = cell.shape.name, str(seed), compact(cell.budget)
    folder = os.path.join(self._workdir, FOLDER, *parts)
    own = self.costs.settings(cell.shape, cell.steps, seed)
    fix = "the settings that it was begun with, another --workdir, or remove it"
    entries.check_folder(own, folder, self._shared, fix, branched=True)
    name = f"{cell.shape.name} at {compact(cell.budget)}"
    entry = entries.entry_of(self._shared, name, own, folder, self._mesh)
    run = Run(cell=cell, entry=entry, n=self.costs.size(cell.shape), held_out=held_out)
    trunks = [
      other
      for other in self._runs
      if (other.cell.shape, other.entry.seed) == (cell.shape, seed)
      and other.trunk_ends <= run.trunk_ends
      and other.result.finished
    ]
    trunk = max(trunks, key=lambda other: other.trunk_ends, default=None)
    return dataclasses.replace(run, trunk=trunk)

  # --- training ------------------------------------------------------------------------------------

  def _train(self, next_budgets: Sequence[float]) -> str | None:
    """Trains the runs that have been planned; `next_budgets` are those that are planned after them."""
    by_folder = {run.entry.folder: run for run in self._runs}
    trains = not all(run.result.ended for run in self._runs)
    if next_budgets and not trains:
      return None

    def seconds(left: Sequence[Entry]) -> float:
      runs = (by_folder[entry.folder] for entry in left)
      expected = [(run.cell.shape, run.flops_beyond_trunk) for run in runs]
      planned = [each for budget in next_budgets for each in self._planned(budget)]
      expected += [(each.shape, each.flops) for each in planned if not each.ended]
      self._measure()
      return sum(self._speeds.seconds(*each) for each in expected)

    stopped_by = sequence.train(
      [run.entry for run in self._runs], self._mesh, "isoflop", after_each=self._write_runs,
      begin=lambda entry: _begin(by_folder[entry.folder]), later=seconds, more=bool(next_budgets),
    )  # fmt: skip
    if trains and self._has_caught_up:
      self.report()
    return stopped_by

  @property
  def _has_caught_up(self) -> bool:
    """False while a study that goes on tells of fewer runs than its results did when it was begun."""
    return len(self._runs) >= self._told_before

  def _write_runs(self) -> None:
    if hosts.is_main() and self._has_caught_up:
      report.write_runs(self._workdir, [(run, run.result) for run in self._runs], self._images)

  def _train_held_out(self) -> str | None:
    """Forecasts the run that is held out, writes its config, and trains it."""
    found = findings.find(self._settings, self.costs, self._images, self._runs)
    self._held_out = self.write_config(self._own.held_out, found, "isoflop.held_out")
    self._runs.append(self._run(self._held_out.cell, self._own.seeds[0], held_out=True))
    return self._train(())

  def _reached(self) -> HeldOut | None:
    if self._held_out is None:
      return None
    (run,) = (run for run in self._runs if run.held_out)
    cell, forecast = self._held_out.cell, self._held_out.forecast
    return HeldOut(cell, forecast, run.result.validation_loss)

  def _forecast(self, budget: float, found: Findings, name: str) -> HeldOut:
    if found.fit is None or found.frontier is None:
      raise UserError(
        f"config.{name}: {compact(budget)}: too few runs have finished to fit a surface to; expected more than "
        "5, at two budgets; fix: the same command trains them"
      )
    size = found.frontier.best_size(budget)
    if size > found.frontier.range[1]:
      raise UserError(
        f"config.{name}: {compact(budget)}: out of range: the best size is more than {BEYOND:g} times the largest "
        f"that was fitted, {found.fit.largest:,.0f} parameters; expected a smaller budget; fix: larger "
        "isoflop.budgets"
      )
    # A size below the range gets the smallest shape there is, which isn't far from those that were fitted.
    cell = self._best_cell(budget, size, name)
    n = self.costs.size(cell.shape)
    return HeldOut(cell, Estimate(*found.fit.forecast(n, cell.tokens)))


@dataclasses.dataclass(frozen=True)
class _Planned:
  """An expected run: FLOPs beyond a shared trunk, and True if it has ended."""

  shape: Shape
  flops: float
  ended: bool


def _begin(run: Run) -> None:
  """Has a run that hasn't begun go on from its trunk, if it has one."""
  folder, trunk = run.entry.folder, run.trunk
  if trunk is None or not hosts.on_any(not files.exists(folder), "a look for a run"):
    return
  step = trunk.trunk_ends
  there = step in checkpoint.whole_steps(trunk.entry.folder)
  if hosts.on_any(not there, "a look for a trunk"):
    say(f"isoflop: {trunk.entry.folder} has lost its checkpoint of step {step:,}: begun at step 0")
    return
  branches.branch(trunk.entry.folder, step, folder)
  say(f"isoflop: goes on from step {step:,} of {trunk.entry.name}")
