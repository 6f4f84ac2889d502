"""Mistakes in a run: its guard, its clock, when it evaluates and saves, and where it goes on."""

from support.mutations.mutation import Mutation

_GUARD = "unit/runner/test_guard.py"
_GOODPUT = "unit/runner/test_goodput.py"
_SAVER = "unit/runner/test_saver.py"
_LOOP = "unit/runner/test_loop.py"

MUTATIONS = (
  Mutation(
    "guard-a-step-late",
    "runner/guard.py",
    'if in_row < self._config.in_row or self._config.then == "warn":',
    'if in_row <= self._config.in_row or self._config.then == "warn":',
    f"{_GUARD}::test_so_many_in_a_row_are_too_many",
  ),
  Mutation(
    "well-until-the-bad-step",
    "runner/guard.py",
    "self._well = step - in_row if self._well is None else max(self._well, step - in_row)",
    "self._well = step if self._well is None else max(self._well, step)",
    f"{_GUARD}::test_so_many_in_a_row_are_too_many",
  ),
  Mutation(
    "spike-above-the-last-loss",
    "runner/guard.py",
    "statistics.median(self._losses) if",
    "self._losses[-1] if",
    f"{_GUARD}::test_a_spike_is_above_the_median_of_the_newest",
  ),
  Mutation(
    "spikes-among-the-losses",
    "runner/guard.py",
    "      self._spiked(step, median, values, state, batch)\n      return",
    "      self._spiked(step, median, values, state, batch)",
    f"{_GUARD}::test_a_spike_is_above_the_median_of_the_newest",
  ),
  Mutation(
    "back-to-the-bad-checkpoint",
    "runner/guard.py",
    "good = [step for step in steps if step <= bad.since]",
    "good = [step for step in steps if step <= bad.step]",
    f"{_GUARD}::test_going_back_moves_what_came_since_away",
  ),
  Mutation(
    "back-once-more",
    "runner/guard.py",
    "if before >= config.rollbacks or not good:",
    "if before > config.rollbacks or not good:",
    f"{_GUARD}::test_going_back_ends",
  ),
  Mutation(
    "back-to-the-same-data",
    "workspace/rollbacks.py",
    "range(1, len(rollback_steps(folder)) + 1)",
    "range(1, len(rollback_steps(folder)))",
    f"{_GUARD}::test_going_back_moves_what_came_since_away",
  ),
  Mutation(
    "abandoned-step-stands",
    "workspace/rollbacks.py",
    "any(back_to < step for back_to in",
    "any(back_to > step for back_to in",
    "unit/workspace/test_watch.py::test_a_step_that_the_run_went_back_behind_has_no_numbers",
  ),
  Mutation(
    "branch-with-the-order-before",
    "workspace/rollbacks.py",
    "any(to <= step for to in",
    "any(to < step for to in",
    "unit/runner/test_data_order.py::test_a_branch_has_the_order_that_its_checkpoint_goes_on_with",
  ),
  Mutation(
    "decays-results-stand",
    "workspace/watch.py",
    'kept["checkpoint"]["parameters"] in map(',
    'kept["checkpoint"]["parameters"] not in map(',
    "unit/workspace/test_watch.py::test_a_decay_that_the_run_has_left_has_no_numbers",
  ),
  Mutation(
    "trunks-end-not-saved",
    "runner/loop.py",
    "step % self.save_every == 0 or step in self.save_at",
    "step % self.save_every == 0",
    "jobs/test_decay.py::test_the_trunk_is_the_same_at_every_length",
  ),
  Mutation(
    "resumed-a-batch-late",
    "runner/data_order.py",
    "start_step=step,",
    "start_step=step + 1,",
    "unit/runner/test_data_order.py::test_a_run_goes_on_with_the_next_batch",
  ),
  Mutation(
    "resumed-with-a-batch-again",
    "runner/data_order.py",
    "start_step=step,",
    "start_step=max(step - 1, 0),",
    "unit/runner/test_data_order.py::test_a_run_goes_on_with_the_next_batch",
  ),
  Mutation(
    "back-to-the-first-order",
    "runner/data_order.py",
    "      seed=self._seeds()[-1],\n",
    "      seed=self._seeds()[0],\n",
    "unit/runner/test_data_order.py::test_a_run_goes_on_with_the_next_batch",
  ),
  Mutation(
    "never-evaluated-in-between",
    "runner/loop.py",
    "self.eval_every and step % self.eval_every == 0",
    "self.eval_every and step % self.eval_every == 1",
    f"{_LOOP}::test_when_it_evaluates",
  ),
  Mutation(
    "not-evaluated-at-the-end",
    "runner/loop.py",
    "due = step >= steps or",
    "due = step > steps or",
    f"{_LOOP}::test_when_it_evaluates",
  ),
  Mutation(
    "logged-a-step-late",
    "runner/loop.py",
    "logged.keep(at_step, values, read)",
    "logged.keep(at_step + 1, values, read)",
    "faults/test_bad_numbers.py::test_goes_back_with_other_data",
  ),
  Mutation(
    "data-wait-counted-as-steps",
    "runner/goodput.py",
    '    here["step"] -= waited\n',
    "",
    f"{_GOODPUT}::test_every_second_has_a_phase",
  ),
  Mutation(
    "repeated-seconds-kept",
    "runner/goodput.py",
    "        seconds[name] = kept.get(name, 0.0)\n",
    "",
    f"{_GOODPUT}::test_a_kill_loses_what_came_after_the_checkpoint",
  ),
  Mutation(
    "goodput-without-losses",
    "runner/goodput.py",
    'seconds["step"] / max(sum(seconds.values()), 1e-9)',
    'seconds["step"] / max(sum(seconds[name] for name in PHASES), 1e-9)',
    f"{_GOODPUT}::test_a_kill_loses_what_came_after_the_checkpoint",
  ),
  Mutation(
    "pauses-of-one-length",
    "runner/saving.py",
    "min(2 * pause, _LONGEST_PAUSE)",
    "min(pause, _LONGEST_PAUSE)",
    f"{_SAVER}::test_a_failed_save_is_tried_at_growing_intervals_for_so_long",
  ),
  Mutation(
    "tried-for-ever",
    "runner/saving.py",
    "deadline = began + self._seconds",
    "deadline = began + 2 * self._seconds",
    f"{_SAVER}::test_a_failed_save_is_tried_at_growing_intervals_for_so_long",
  ),
  Mutation(
    "end-seen-after-the-list",
    "workspace/watch.py",
    "    if ended:\n      say(",
    "    if _training_has_ended(self._watched):\n      say(",
    "unit/workspace/test_watch.py::test_a_checkpoint_written_just_before_the_end_is_not_missed",
  ),
  Mutation(
    "results-of-another-checkpoint",
    "workspace/watch.py",
    "results(out, self._result) is not None and not _differing(out, made_from)",
    "results(out, self._result) is not None",
    "unit/workspace/test_watch.py::test_a_step_that_was_written_again_is_done_again",
  ),
)
