"""The comparison of an ablation's runs, seeds paired: ablate.csv (a row for each run and seed) and ablate.md."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence

from igpt_jax import files, units
from igpt_jax.ablation.entries import Entry, compared, differences
from igpt_jax.ablation.outcomes import Point, Result, in_one_unit
from igpt_jax.reporting.tables import csv_table, markdown_table

# Settings that runs of different lengths differ in.
_OF_LENGTH = (
  "train.steps", "train.warmup_steps", "train.decay_steps", "train.eval_every",
  "train.checkpoint_every", "train.log_every",
)  # fmt: skip
_PREFIXES = (
  (1e18, "EFLOP"),
  (1e15, "PFLOP"),
  (1e12, "TFLOP"),
  (1e9, "GFLOP"),
  (1e6, "MFLOP"),
  (1.0, "FLOP"),
)


@dataclasses.dataclass(frozen=True)
class Mean:
  """A mean over seeds.

  Attributes:
    mean: the mean; nan of no values.
    spread: the sample standard deviation; nan of less than two values.
    n: the number of values.
  """

  mean: float
  spread: float
  n: int

  @classmethod
  def of(cls, values: Sequence[float]) -> "Mean":
    values = [value for value in values if not math.isnan(value)]
    spread = statistics.stdev(values) if len(values) > 1 else math.nan
    return cls(statistics.fmean(values) if values else math.nan, spread, len(values))

  def text(self, form: str) -> str:
    """Formats "mean ± spread", the spread without a sign; "" if there are no values."""
    if not self.n:
      return ""
    spread = "" if math.isnan(self.spread) else f" ± {self.spread:{form.lstrip('+')}}"
    return f"{self.mean:{form}}{spread}"


@dataclasses.dataclass(frozen=True)
class Run:
  """A run with all of its seeds, in their order."""

  results: tuple[Result, ...]

  @property
  def entry(self) -> Entry:
    """The run with its first seed, which stands for it where seeds make no difference."""
    return self.results[0].entry

  @property
  def name(self) -> str:
    return self.entry.name

  @property
  def unit(self) -> str:
    """The unit of its losses."""
    return self.results[0].unit

  def mean(self, field: str) -> Mean:
    return Mean.of([getattr(result, field) for result in self.results])


def runs_of(results: Sequence[Result]) -> list[Run]:
  """Returns the results by run, their losses in one unit; the first is the baseline's."""
  by_name: dict[str, list[Result]] = {}
  for result in in_one_unit(results):
    by_name.setdefault(result.entry.name, []).append(result)
  return [Run(tuple(of_run)) for of_run in by_name.values()]


def pairs(run: Run, baseline: Run) -> list[tuple[Result, Result]]:
  """Returns the finished results of both runs with the same seed."""
  theirs = {result.entry.seed: result for result in baseline.results if result.finished}
  ours = (result for result in run.results if result.finished)
  return [(result, theirs[result.entry.seed]) for result in ours if result.entry.seed in theirs]


def paired_difference(run: Run, baseline: Run, field: str = "validation_loss") -> Mean:
  """Returns the differences to the baseline, seed by seed."""
  return Mean.of([getattr(a, field) - getattr(b, field) for a, b in pairs(run, baseline)])


def step_reaching(curve: Sequence[Point], loss: float) -> float:
  """Returns the step of the first evaluation at or below a loss; nan if there is none.

  Nothing is interpolated: where a decay begins, a curve lies above the straight line between its evaluations.
  """
  return next((point.step for point in curve if point.loss <= loss), math.nan)


def share_of_flops(run: Run, baseline: Run) -> Mean:
  """Returns, of the baseline's FLOPs, those until the run's first evaluation at or below its final validation loss.

  Seed by seed; those that don't reach it are left out of the mean and of its n.
  """
  return Mean.of([
    step_reaching(a.curve, b.validation_loss) * a.entry.flops_per_step / b.entry.flops
    for a, b in pairs(run, baseline)
  ])  # fmt: skip


def with_shorter(runs: Sequence[Run]) -> list[tuple[Run, list[Run]]]:
  """Returns each run with those that are the same but for fewer steps, longest first; all of them once.

  What goes with the number of steps may differ, too. If several runs are equally long, a shorter one
  stands beside that whose warm-up and decay it has, and alone if it has neither's.
  """
  kinds: dict[str, list[Run]] = {}
  for run in runs:
    own = compared(run.entry.settings)
    kept = {name: value for name, value in own.items() if name not in _OF_LENGTH}
    kinds.setdefault(files.digest(kept), []).append(run)
  beside: dict[str, list[Run]] = {}  # of each run that isn't beside another
  for kind in kinds.values():
    kind.sort(key=lambda run: -run.entry.steps)
    longest = [run for run in kind if run.entry.steps == kind[0].entry.steps]
    beside |= {run.name: [] for run in longest}
    for run in kind[len(longest) :]:
      alike = [each for each in longest if len(longest) == 1 or _ramps(each) == _ramps(run)]
      if alike:
        beside[alike[0].name].append(run)
      else:
        beside[run.name] = []
  return [(run, beside[run.name]) for run in runs if run.name in beside]


def _ramps(run: Run) -> tuple[int, int]:
  return run.entry.settings.train.warmup_steps, run.entry.settings.train.decay_steps


# --- ablate.csv ------------------------------------------------------------------------------------

_COLUMNS: dict[str, Callable[[Result], object]] = {
  "name": lambda result: result.entry.name,
  "seed": lambda result: result.entry.seed,
  "parameters": lambda result: result.entry.parameters,
  "steps": lambda result: result.entry.steps,
  "flops_per_step": lambda result: result.entry.flops_per_step,
  "flops": lambda result: result.entry.flops,
  **{
    name: lambda result, name=name: _number(getattr(result, name))
    for name in (
      "step_seconds", "train_loss", "validation_loss", "test_loss", "probe_accuracy"
    )
  },
  "unit": lambda result: result.unit,
  "status": lambda result: result.status,
}  # fmt: skip


def _number(value: float) -> object:
  return "" if math.isnan(value) else value


def csv_text(runs: Sequence[Run]) -> str:
  """Returns ablate.csv."""
  changed = overrides(runs)
  rows = [
    [
      result.entry.name,
      changed[run.name],
      *(column(result) for column in list(_COLUMNS.values())[1:]),
    ]
    for run in runs
    for result in run.results
  ]
  return csv_table(["name", "overrides", *list(_COLUMNS)[1:]], rows)


def overrides(runs: Sequence[Run]) -> dict[str, str]:
  """Returns, by name, the settings in which a run differs from the baseline."""
  differing = differences([run.entry for run in runs])
  return {
    run.name: " ".join(
      f"{name}={values[i]}" for name, values in differing.items() if values[i] != values[0]
    )
    for i, run in enumerate(runs)
  }


# --- ablate.md -------------------------------------------------------------------------------------


def markdown(runs: Sequence[Run], notes: Sequence[str] = ()) -> str:
  """Returns ablate.md; `notes`: in words, what keeps losses from being compared."""
  baseline = runs[0]
  scale, unit = flop_unit(max(run.entry.flops for run in runs))
  rows = []
  for run in by_loss(runs):
    entry = run.entry
    rows.append((
      f"{run.name} (baseline)" if run is baseline else run.name, _seeds(run),
      f"{entry.parameters:,}", f"{entry.steps:,}", f"{entry.flops / scale:.4g}",
      f"{entry.flops / baseline.entry.flops:.3f}", run.mean("step_seconds").text(".3f"),
      run.mean("train_loss").text(".4f"), run.mean("validation_loss").text(".4f"),
      "" if run is baseline else _difference(run, baseline), run.mean("test_loss").text(".4f"),
      run.mean("probe_accuracy").text(".2%"), _reached(run, baseline),
    ))  # fmt: skip
  head = (
    "run", "seeds", "parameters", "steps", unit, "× FLOPs", "s/step", "train", "validation",
    "− baseline's, paired", "test", "probe", "baseline's loss at",
  )  # fmt: skip
  empty = {i for i in range(len(head)) if not any(row[i] for row in rows)}
  kept = [i for i in range(len(head)) if i not in empty]
  table = markdown_table(
    "l" + "r" * (len(kept) - 1), [head[i] for i in kept], [[row[i] for i in kept] for row in rows]
  )
  parts = ["# Ablation", verdict(runs), table.rstrip(), _legend(runs)]
  parts += [f"**Not comparable** in {note}" for note in notes]
  if lines := _lengths(runs):
    parts.append("\n".join(lines))
  if differing := differences([run.entry for run in runs]):
    cells = ((f"`{name}`", *map(_shown, values)) for name, values in differing.items())
    fields = markdown_table("l" * (1 + len(runs)), ("setting", *(run.name for run in runs)), cells)
    parts.append(f"## Settings that differ\n\n{fields.rstrip()}")
  return "\n\n".join(parts) + "\n"


def by_loss(runs: Sequence[Run]) -> list[Run]:
  """Returns the runs, the best first, each followed by the shorter ones of its kind."""
  return [each for run, short in with_shorter(sorted(runs, key=_rank)) for each in (run, *short)]


def _rank(run: Run) -> tuple[bool, float]:
  """Returns what orders runs by their validation loss, those of which a seed has diverged last."""
  loss = run.mean("validation_loss").mean
  diverged = any(result.ended and not result.finished for result in run.results)
  return diverged, math.inf if math.isnan(loss) else loss


def verdict(runs: Sequence[Run]) -> str:
  """Returns a line: the run with the best validation loss, and what it reaches with how much."""
  baseline = runs[0]
  done = [run for run in runs if run.mean("validation_loss").n]
  if not done:
    return "No run has finished."
  best = min(done, key=_rank)
  loss, seeds = best.mean("validation_loss"), len(best.results)
  text = (
    f"Best on validation: {best.name}, {loss.text('.4f')} {best.unit}{_if_fewer(loss.n, seeds)}"
  )
  difference = paired_difference(best, baseline)
  if best is baseline or not difference.n:
    return f"{text}."
  reached = share_of_flops(best, baseline)
  at = f"; {baseline.name}'s final loss at {reached.mean:.1%} of its FLOPs" if reached.n else ""
  at += _if_fewer(reached.n, seeds) if at else ""
  paired = _if_fewer(difference.n, seeds) or f" ({units.counted(seeds, 'seed')})"
  return f"{text}, {difference.text('+.4f')} against {baseline.name}{paired}{at}."


def _if_fewer(n: int, seeds: int) -> str:
  """Formats " (2 of 3 seeds)", which a mean is over; "" if it is over all of them."""
  return f" ({n} of {units.counted(seeds, 'seed')})" if n < seeds else ""


def _seeds(run: Run) -> str:
  """Formats "3", or "2 of 3: seed 1 diverged at step 40"."""
  others = [result for result in run.results if not result.finished]
  if not others:
    return str(len(run.results))
  why = ", ".join(f"seed {result.entry.seed} {result.status}" for result in others)
  return f"{len(run.results) - len(others)} of {len(run.results)}: {why}"


def _difference(run: Run, baseline: Run) -> str:
  """Formats the paired difference of validation losses, "" without pairs."""
  difference = paired_difference(run, baseline)
  if not difference.n:
    return ""
  return difference.text("+.4f") + _if_fewer(difference.n, len(run.results))


def _reached(run: Run, baseline: Run) -> str:
  """Formats the share of the baseline's FLOPs at which its final validation loss is reached."""
  if run is baseline or not pairs(run, baseline):
    return ""
  reached = share_of_flops(run, baseline)
  if not reached.n:
    return "not reached"
  return reached.text(".1%") + _if_fewer(reached.n, len(run.results))


def _legend(runs: Sequence[Run]) -> str:
  return (
    f"Losses in {runs[0].unit}, best first; a run with a diverged seed stands last. ±: sample standard "
    "deviation over the seeds that have finished; differences are of the same seed. s/step: median, beside whatever else the machine did. "
    f"“Baseline's loss at”: the share of {runs[0].name}'s FLOPs until a run's first evaluation at or below the "
    "final validation loss of the same seed; what lies between evaluations isn't known."
  )


def _lengths(runs: Sequence[Run]) -> list[str]:
  """Returns a line for each run that is a shorter one of the same kind, with a schedule of its own."""
  baseline, lines = runs[0], []
  for run, shorter in with_shorter(sorted(runs, key=_rank)):
    for short in shorter:
      difference = _difference(short, baseline)
      to = f", {difference} against {baseline.name}" if difference else ""
      share = short.entry.flops / baseline.entry.flops
      lines.append(
        f"- {short.name} is {run.name} with a whole schedule in {short.entry.steps:,} of its "
        f"{run.entry.steps:,} steps: {share:.1%} of {baseline.name}'s FLOPs{to}."
      )
  return lines


def _shown(value: object) -> str:
  return f"`{value!r}`"


def flop_unit(flops: float) -> tuple[float, str]:
  """Returns (FLOPs in one, name) of the unit that an amount is told in."""
  return next(unit for unit in _PREFIXES if flops >= unit[0] or unit[0] == 1)
