"""Mistakes in checkpoints: what is written, compared, kept and found again."""

from support.mutations.mutation import Mutation

_CHECKPOINT = "unit/checkpoint/test_checkpoint.py"
_RESTORED = f"{_CHECKPOINT}::test_restored_state_is_the_saved_one_on_any_mesh"
_FILES = "faults/test_checkpoint_files.py"
_ONE = "unit/checkpoint/test_one_file.py"
_SUMS = "unit/probing/test_features.py::test_checksums_tell_parameters_apart"

MUTATIONS = (
  Mutation(
    "checksum-skipped",
    "checkpoint/file_sums.py",
    "if name in sums and checksum(item) != sums[name]:",
    "if name not in sums and checksum(item) != sums[name]:",
    f"{_FILES}::test_other_numbers_are_noticed_though_every_file_is_right",
  ),
  Mutation(
    "run-not-compared",
    "checkpoint/file_sums.py",
    "if sums.pop(_RUN, None) != files.digest([run, sums]):",
    "if sums.pop(_RUN, None) is None:",
    "unit/checkpoint/test_file_sums.py::test_a_description_that_was_changed_is_noticed",
  ),
  Mutation(
    "checksum-blind-to-order",
    "checkpoint/checksum.py",
    "total += int(_mixed(bits ^ index).sum(dtype=np.uint64))",
    "total += int(_mixed(bits).sum(dtype=np.uint64))",
    _SUMS,
  ),
  Mutation(
    "checksum-blind-to-signs",
    "checkpoint/checksum.py",
    "np.ascontiguousarray(part, np.float32).view(np.uint32)",
    "abs(np.ascontiguousarray(part, np.float32)).view(np.uint32)",
    _SUMS,
  ),
  Mutation(
    "checksum-of-devices-differs",
    "checkpoint/checksum.py",
    "jnp.uint32(axis + 1)",
    "jnp.uint32(axis)",
    "unit/probing/test_features.py::test_a_checksum_is_the_same_by_numpy_and_on_a_device",
  ),
  Mutation(
    "moments-not-restored",
    "checkpoint/writing.py",
    '**loaded["training"],',
    '**loaded["training"] | {"opt_state": jax.tree.map(lambda x: 0 * x, loaded["training"]["opt_state"])},',
    _RESTORED,
  ),
  Mutation(
    "skips-not-restored",
    "checkpoint/writing.py",
    "run.get(_SKIPPED, (0, 0))",
    "run.get(None, (0, 0))",
    _RESTORED,
  ),
  Mutation(
    "palette-not-saved",
    "checkpoint/writing.py",
    "if palette is not None:",
    "if palette is None and run is None:",
    f"{_CHECKPOINT}::test_a_model_is_read_without_its_optimizer",
  ),
  Mutation(
    "none-kept-for-good",
    "checkpoint/writing.py",
    "preserve.append(policies.EveryNSteps(keep_every))",
    "policies.EveryNSteps(keep_every)",
    f"{_CHECKPOINT}::test_retention",
  ),
  Mutation(
    "one-more-kept",
    "checkpoint/writing.py",
    "policies.LatestN(keep)",
    "policies.LatestN(keep + 1)",
    f"{_CHECKPOINT}::test_retention",
  ),
  Mutation(
    "the-last-of-the-best",
    "checkpoint/writing.py",
    'scores[keep_best], -scores["step"]',
    'scores[keep_best], scores["step"]',
    f"{_CHECKPOINT}::test_the_first_of_the_best_is_kept",
  ),
  Mutation(
    "a-step-saved-twice",
    "checkpoint/writing.py",
    "again = step == self.latest()",
    "again = step is None",
    f"{_CHECKPOINT}::test_saving_a_step_twice_writes_it_once",
  ),
  Mutation(
    "half-written-is-whole",
    "checkpoint/folders.py",
    "return is_finished(folder) and ocp.is_orbax_checkpoint(folder)",
    "return os.path.isdir(folder)",
    f"{_CHECKPOINT}::test_half_written_steps_are_not_there",
  ),
  Mutation(
    "the-oldest-is-newest",
    "checkpoint/folders.py",
    "max(whole_steps(workdir), default=None)",
    "min(whole_steps(workdir), default=None)",
    f"{_CHECKPOINT}::test_a_checkpoint_is_found_by_workdir_or_step",
  ),
  Mutation(
    "resumed-from-the-oldest",
    "checkpoint/writing.py",
    "for step in reversed([checkpoint.step for checkpoint in self._checkpointer.checkpoints]):",
    "for step in [checkpoint.step for checkpoint in self._checkpointer.checkpoints]:",
    f"{_FILES}::test_what_fails_to_be_read_only_once_is_not_set_aside",
  ),
  Mutation(
    "damaged-left-in-the-way",
    "checkpoint/writing.py",
    "        self._set_aside(why)\n        self._checkpointer = self._open()",
    "        self._checkpointer = self._open()",
    f"{_FILES}::test_the_newest_good_one_may_be_far_back",
  ),
  Mutation(
    "one-file-not-compared",
    "checkpoint/one_file.py",
    "  file_sums.check(info.path, info.sums, {_PARAMS: params})\n",
    "",
    f"{_ONE}::test_no_changed_byte_goes_unnoticed",
  ),
  Mutation(
    "one-file-tells-paths",
    "checkpoint/one_file.py",
    "values[field] = declaration.default",
    "pass",
    f"{_ONE}::test_it_tells_no_places_of_the_machine_that_it_was_made_on",
  ),
)
