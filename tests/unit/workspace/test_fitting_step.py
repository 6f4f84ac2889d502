"""The number of a batch's parts in which a training step fits."""

import types

import jax
import pytest

from igpt_jax.config import choices
from igpt_jax.config.fields import with_values
from igpt_jax.errors import DoesNotFit
from igpt_jax.parallel import hardware
from igpt_jax.training import compilation
from igpt_jax.workspace import fitting_step, measurements, memory
from support.tiny import mesh_of, settings_of

REFUSED = (
  "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used "
  "40.00G of 15.75G hbm. Exceeded hbm capacity by 24.25G."
)


def settings_with(batch_size, accumulate=1):
  changes = {
    "model.n_layer": 1, "model.n_head": 2, "model.n_embd": 16, "palette.size": 17,
    "train.batch_size": batch_size, "train.accumulate": accumulate,
  }  # fmt: skip
  return choices.settle(settings_of(changes=changes))


def model_of(settings):
  return choices.model_config(settings, n_vocab=17)


@pytest.fixture
def compiler(monkeypatch):
  """A compiler whose step needs 100 bytes, and 10 for each image of a part on a device."""
  asked = []

  def compiled_step(settings, model, mesh):
    asked.append(settings.train.accumulate)
    images = settings.train.batch_size // mesh.size // settings.train.accumulate
    return types.SimpleNamespace(needed_bytes=100 + 10 * images)

  monkeypatch.setattr(measurements, "compiled_step", compiled_step)
  monkeypatch.setattr(memory, "check_state", lambda *of: None)
  monkeypatch.setattr(memory, "training_bytes", lambda *of: 0)

  def with_memory(n_bytes):
    monkeypatch.setattr(hardware, "memory_bytes", lambda device: n_bytes)
    return asked

  return with_memory


def test_a_step_that_fits_is_compiled_once(compiler):
  asked = compiler(420)
  settings = settings_with(32)
  found = fitting_step.compile_fitting(settings, model_of(settings), mesh_of())
  assert asked == [1] and found.settings is settings and found.notes == []


def test_a_step_that_does_not_fit_gets_as_many_parts_as_it_needs(compiler):
  asked = compiler(200)
  settings = settings_with(32)
  found = fitting_step.compile_fitting(settings, model_of(settings), mesh_of())
  # 420 bytes in one part, of which all are taken to be the images': 4 parts need 180.
  assert asked == [1, 4] and found.settings.train.accumulate == 4
  assert found.compiled.needed_bytes == 180
  (note,) = found.notes
  assert note.startswith("batch 32: a step needs") and "of a device's" in note


def test_the_estimate_is_repeated_where_it_was_too_low(compiler):
  asked = compiler(125)
  settings = settings_with(32)
  found = fitting_step.compile_fitting(settings, model_of(settings), mesh_of())
  assert asked == [1, 4, 8, 16] and found.compiled.needed_bytes == 120


def test_what_does_not_fit_image_by_image_is_refused(compiler):
  asked = compiler(105)
  settings = settings_with(16)
  with pytest.raises(DoesNotFit, match=r"training: batch 16 in 16 parts: a step needs .*fix: more"):
    fitting_step.compile_fitting(settings, model_of(settings), mesh_of())
  assert asked[-1] == 16


def test_a_state_that_does_not_fit_is_refused_before_compiling(monkeypatch):
  monkeypatch.setattr(hardware, "memory_bytes", lambda device: 1)
  monkeypatch.setattr(measurements, "compiled_step", lambda *args: pytest.fail("compiled"))
  settings = settings_with(16)
  with pytest.raises(DoesNotFit, match="parameters"):
    fitting_step.compile_fitting(settings, model_of(settings), mesh_of())


def test_what_the_tpu_compiler_refuses_is_taken_at_its_word(monkeypatch):
  def compiled_step(settings, model, mesh):
    if settings.train.accumulate < 4:
      raise jax.errors.JaxRuntimeError(REFUSED)
    return types.SimpleNamespace(needed_bytes=2**33)

  monkeypatch.setattr(measurements, "compiled_step", compiled_step)
  monkeypatch.setattr(hardware, "memory_bytes", lambda device: 15.75 * 2**30)
  settings = settings_with(32)
  found = fitting_step.compile_fitting(settings, model_of(settings), mesh_of())
  assert found.settings.train.accumulate == 4
  assert found.notes == ["batch 32: a step needs 40.00 GiB of a device's 15.75 GiB"]


def test_another_error_of_the_compiler_is_not_taken_for_a_lack_of_memory(monkeypatch):
  def compiled_step(settings, model, mesh):
    raise jax.errors.JaxRuntimeError("INTERNAL: Mosaic failed to compile TPU kernel")

  monkeypatch.setattr(measurements, "compiled_step", compiled_step)
  settings = settings_with(32)
  with pytest.raises(jax.errors.JaxRuntimeError, match="Mosaic"):
    fitting_step.compile_fitting(settings, model_of(settings), mesh_of())


def test_parts_divide_over_the_devices():
  mesh = mesh_of((8, 1, 1))
  settings = settings_with(8 * 6)
  assert fitting_step.more_parts(settings, mesh, 400, 100, 100 + 150 / 0.95) == 2
  assert fitting_step.more_parts(settings, mesh, 400, 100, 100 + 75 / 0.95) == 6  # 4 don't divide 6
  assert fitting_step.more_parts(settings, mesh, 400, 100, 100 + 40 / 0.95) == 0
  assert fitting_step.more_parts(settings, mesh, 400, 100, 90) == 0
  already = with_values(settings, {"train.accumulate": 3})
  assert fitting_step.more_parts(already, mesh, 400, 100, 100 + 280 / 0.95) == 6


def test_what_the_compiler_says_it_needs():
  assert compilation.refused_bytes(REFUSED) == 40 * 2**30
  early = "the total bytes of HLO temporaries (16.5G) exceeds available HBM (15.75G)"
  assert compilation.refused_bytes(early) == 16.5 * 2**30
  assert compilation.refused_bytes("Used 12.00M of 16.00M vmem") is None


def test_a_real_step_is_halved(monkeypatch):
  settings, mesh = settings_with(16), mesh_of()
  whole = measurements.compiled_step(settings, model_of(settings), mesh)
  monkeypatch.setattr(hardware, "memory_bytes", lambda device: whole.needed_bytes - 1)
  found = fitting_step.compile_fitting(settings, model_of(settings), mesh)
  assert found.settings.train.accumulate > 1
  assert found.compiled.needed_bytes < whole.needed_bytes
