"""Which of XLA's options a step is compiled with, by the kind of device."""

import jax
import jax.numpy as jnp
import pytest

from igpt_jax.parallel import hardware, sharding
from igpt_jax.training import compilation
from support import tiny


@pytest.mark.parametrize("kind", hardware.CHIPS)
def test_only_wide_matrix_units_have_options(kind):
  wide = kind in ("TPU v6 lite", "TPU v6e", "TPU7x")
  assert bool(compilation.step_options(kind)) == wide
  assert not compilation.step_options("cpu")


def test_a_chip_that_nobody_has_tried_has_none():
  assert not compilation.step_options("TPU 9")


def test_a_step_is_compiled_with_those_of_its_devices(monkeypatch, capsys):
  """And without them, which is said, if the compiler lacks one."""
  mesh = tiny.mesh_of((1, 1, 1))
  where = sharding.replicated(mesh)
  state = {"x": jax.ShapeDtypeStruct((2,), jnp.float32)}
  batch = {"tokens": jax.ShapeDtypeStruct((2,), jnp.float32, sharding=where)}

  asked = []
  monkeypatch.setattr(
    compilation, "step_options", lambda kind: asked.append(kind) or {"no_such": True}
  )
  step = compilation.compile_step(
    lambda state, batch: (state, batch["tokens"].sum()), state, {"x": where}, batch
  )
  assert asked == ["cpu"]
  assert "no_such: not an option of this machine's compiler" in capsys.readouterr().out
  values, total = step.executable({"x": jnp.ones(2)}, {"tokens": jnp.full(2, 3.0)})
  assert total == 6 and values["x"].shape == (2,)
