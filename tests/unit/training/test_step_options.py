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


def test_a_step_is_compiled_with_those_of_its_devices(monkeypatch):
  """A caller's own come on top; XLA refuses a name that it doesn't know."""
  mesh = tiny.mesh_of((1, 1, 1))
  where = sharding.replicated(mesh)
  state = {"x": jax.ShapeDtypeStruct((2,), jnp.float32)}
  batch = {"tokens": jax.ShapeDtypeStruct((2,), jnp.float32, sharding=where)}

  def compiled(options=None):
    return compilation.compile_step(
      lambda state, batch: (state, batch["tokens"].sum()), state, {"x": where}, batch, options
    )

  asked = []
  monkeypatch.setattr(
    compilation, "step_options", lambda kind: asked.append(kind) or {"no_such": True}
  )
  with pytest.raises(Exception, match="no_such"):
    compiled()
  assert asked == ["cpu"]
