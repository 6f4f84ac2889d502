"""Programs compiled for a CPU compute what they say, whatever XLA_FLAGS a user has."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from igpt_jax import cpu_compiler

ROWS = 32_769  # one more than what the faulty fusion takes at a time
SQUARES = float((ROWS - 1) ** 2)

PROGRAM = """
import jax, jax.numpy as jnp
{imports}
x = jnp.stack([jnp.arange(32769.0), jnp.zeros(32769), jnp.zeros(32769)], 1)
f = jax.jit(lambda x: jax.vmap(lambda r: jnp.sum((jnp.eye(3) @ r) ** 2))(x))
print(float(f(x)[-1]), len(jax.devices()))
"""


def run(imports: str, **environment: str) -> subprocess.CompletedProcess:
  inherited = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
  return subprocess.run(
    [sys.executable, "-c", PROGRAM.format(imports=imports)],
    env={**inherited, "JAX_PLATFORMS": "cpu", **environment},
    capture_output=True,
    text=True,
    check=True,
  )


def test_a_product_before_a_sum_of_many_rows_is_right():
  """In the process that runs the tests (the program of jax-ml/jax issue 39103)."""
  x = jnp.stack([jnp.arange(float(ROWS)), jnp.zeros(ROWS), jnp.zeros(ROWS)], 1)
  sums = jax.jit(lambda x: jax.vmap(lambda row: jnp.sum((jnp.eye(3) @ row) ** 2))(x))(x)
  assert float(sums[-1]) == SQUARES


@pytest.mark.parametrize(
  "imports", ["import igpt_jax", "import igpt_jax.main", "from igpt_jax.config import base"]
)
def test_it_is_right_after_any_import(imports):
  assert run(imports).stdout.split() == [str(SQUARES), "1"]


def test_a_users_own_flags_stay():
  done = run("import igpt_jax", XLA_FLAGS="--xla_force_host_platform_device_count=3")
  assert done.stdout.split() == [str(SQUARES), "3"]


def test_the_users_choice_of_that_flag_stays():
  environment = {"XLA_FLAGS": "--xla_cpu_experimental_ynn_fusion_type=FUSION_TYPE_INVALID"}
  before = dict(environment)
  cpu_compiler.avoid_wrong_fusions(environment)
  assert environment == before


@pytest.mark.filterwarnings("ignore:igpt_jax")
@pytest.mark.parametrize(
  "version, faulty",
  [("0.10.2", True), ("0.11.2", True), ("0.12.0", False), ("0.12.0.1", False), ("1.0", False)],
)
def test_versions(version, faulty, monkeypatch):
  monkeypatch.setattr("importlib.metadata.version", lambda package: version)
  environment: dict[str, str] = {}
  cpu_compiler.avoid_wrong_fusions(environment)
  assert bool(environment) == faulty


def test_importing_too_late_is_told(monkeypatch):
  monkeypatch.setattr("importlib.metadata.version", lambda package: "0.10.2")
  jax.devices()
  with pytest.warns(UserWarning, match="fix: import igpt_jax first"):
    cpu_compiler.avoid_wrong_fusions({})
