"""Mistakes in the mesh, settings, reports, the page's limits, jobs and what kept results are known by."""

from support.mutations.mutation import Mutation

_SHARDING = "unit/parallel/test_sharding.py"
_METRICS = "unit/reporting/test_metrics.py"
_SETTINGS = "unit/config/test_settings.py"
_LINE = "unit/demo/test_demo_server.py::test_a_line_is_served_in_order"

MUTATIONS = (
  Mutation(
    "batch-whole-on-fsdp",
    "parallel/sharding.py",
    '"batch": ("data", "fsdp"),',
    '"batch": ("data",),',
    f"{_SHARDING}::test_batch_is_split_over_data_and_fsdp",
  ),
  Mutation(
    "gradients-of-one-device",
    "parallel/sharding.py",
    "total = jax.lax.psum(total, axis)",
    "total = jax.lax.pmean(total, axis)",
    "unit/training/test_step.py::test_every_mesh_trains_as_one_device_does",
  ),
  Mutation(
    "sizes-rounded-down",
    "parallel/sharding.py",
    "return size // parts if size % parts == 0 else None",
    "return size // parts",
    f"{_SHARDING}::test_a_devices_share_of_an_axis",
  ),
  Mutation(
    "batch-divided-by-devices-alone",
    "parallel/sharding.py",
    "parts = batch_shards(mesh) * accumulate",
    "parts = batch_shards(mesh)",
    f"{_SHARDING}::test_a_batch_is_divided_into_parts_that_divide",
  ),
  Mutation(
    "own-rate-ignored",
    "config/choices.py",
    "learning_rate=train.learning_rate or rate,",
    "learning_rate=rate,",
    "unit/config/test_rates.py::test_a_rate_of_ones_own_comes_before_the_sizes",
  ),
  Mutation(
    "bert-at-the-other-rate",
    "config/choices.py",
    "rate = size.learning_rate_masked if masked else size.learning_rate",
    "rate = size.learning_rate",
    "unit/config/test_rates.py::test_a_rate_of_ones_own_comes_before_the_sizes",
  ),
  Mutation(
    "fine-tuned-at-full-rate",
    "config/choices.py",
    "learning_rate=made.learning_rate / 10)",
    "learning_rate=made.learning_rate / 1)",
    f"{_SETTINGS}::test_open_choices_are_made_once",
  ),
  Mutation(
    "lower-bounds-exclusive",
    "config/declare.py",
    '"least": operator.ge',
    '"least": operator.gt',
    "unit/config/test_bounds.py::test_bounds_are_where_they_are_declared",
  ),
  Mutation(
    "upper-bounds-exclusive",
    "config/declare.py",
    '"most": operator.le',
    '"most": operator.lt',
    "unit/config/test_bounds.py::test_bounds_are_where_they_are_declared",
  ),
  Mutation(
    "longest-seed-wraps",
    "data/order.py",
    "MAX_SEED = 2**32 - 1",
    "MAX_SEED = 2**32",
    "unit/data/test_pipeline.py::test_seeds_beyond_32_bits_are_refused",
  ),
  Mutation(
    "resumed-metrics-twice",
    "reporting/metrics.py",
    'return json.loads(line)["step"] <= step',
    'return json.loads(line)["step"] <= step + 10',
    f"{_METRICS}::test_resuming_drops_what_comes_after",
  ),
  Mutation(
    "resumed-metrics-lost",
    "reporting/metrics.py",
    'return json.loads(line)["step"] <= step',
    'return json.loads(line)["step"] < step',
    f"{_METRICS}::test_resuming_drops_what_comes_after",
  ),
  Mutation(
    "pauses-are-training",
    "reporting/progress.py",
    "max(time.monotonic() - began - self._paused, 1e-9)",
    "max(time.monotonic() - began, 1e-9)",
    f"{_METRICS}::test_pauses_are_no_training_time",
  ),
  Mutation(
    "speed-in-steps",
    "reporting/progress.py",
    "speed = (step - first) * self.images_per_step / self._seconds",
    "speed = (step - first) / self._seconds",
    f"{_METRICS}::test_speed_mfu_and_time_left",
  ),
  Mutation(
    "variance-for-standard-error",
    "reporting/plots.py",
    "math.sqrt(accuracy * (1 - accuracy) / images)",
    "accuracy * (1 - accuracy) / images",
    "unit/reporting/test_plots.py::test_accuracies_have_their_standard_error_and_chance",
  ),
  Mutation(
    "one-more-waits",
    "demo/limits.py",
    "if self._places >= self._most:",
    "if self._places > self._most:",
    _LINE,
  ),
  Mutation(
    "place-not-given-back",
    "demo/limits.py",
    "self._places -= 1",
    "self._places -= 0",
    _LINE,
  ),
  Mutation(
    "all-rows-given",
    "demo/request.py",
    "if not 0 < keep < 1:",
    "if not 0 < keep <= 1:",
    "unit/demo/test_demo_server.py::test_settings_out_of_range_are_named",
  ),
  Mutation(
    "nats-under-another-mask",
    "training/evaluation.py",
    "self._put(batch), self._key(0))",
    "self._put(batch), self._key(1))",
    "jobs/test_api.py::test_nats_are_those_of_the_job",
  ),
  Mutation(
    "bits-for-nats",
    "jobs/evaluate.py",
    "nats / math.log(2)",
    "nats * math.log(2)",
    "jobs/test_end_to_end.py::test_evaluate",
  ),
  Mutation(
    "samples-of-any-parameters",
    "workspace/provenance.py",
    '"parameters": weights.checksum_of(info),',
    '"parameters": "",',
    "jobs/test_complete.py::test_another_model_in_the_same_place_is_refused",
  ),
  Mutation(
    "the-last-of-equals-is-best",
    "jobs/finetune.py",
    "if accuracy > self.accuracy:",
    "if accuracy >= self.accuracy:",
    "unit/jobs/test_best.py::test_the_first_of_equals_is_the_best",
  ),
  Mutation(
    "newer-formats-read",
    "history.py",
    "if number > FORMAT:",
    "if number > FORMAT + 1:",
    "unit/ground/test_history.py::test_a_newer_workdir_is_refused",
  ),
  Mutation(
    "packaged-before-the-workdirs",
    "workspace/weights.py",
    "if of_a_run or settings.checkpoint or settings.init_from:",
    "if settings.checkpoint or settings.init_from:",
    "jobs/test_packaged.py::test_it_is_not_used_where_another_is_named_or_was_trained",
  ),
)
