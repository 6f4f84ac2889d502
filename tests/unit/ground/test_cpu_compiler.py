"""Programs compiled for a CPU compute what they say, whatever XLA_FLAGS a user has."""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from igpt_jax import cpu_compiler
from igpt_jax.model.image_gpt import bind
from igpt_jax.parallel import sharding
from igpt_jax.training.state import param_shardings
from support import tiny

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


ORDERED = "--xla_cpu_enable_concurrency_optimized_scheduler=false"


@pytest.mark.parametrize(
  ("environment", "devices", "ordered"),
  [
    ({"JAX_NUM_CPU_DEVICES": "2"}, 0, True),
    ({"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}, 0, True),
    ({}, 3, True),
    ({}, 1, False),
    ({"JAX_NUM_CPU_DEVICES": "1"}, 1, False),
    ({"XLA_FLAGS": f"{ORDERED[:-5]}true"}, 8, False),
  ],
)
def test_collectives_of_several_devices_are_kept_in_order(environment, devices, ordered):
  cpu_compiler.keep_collectives_in_order(devices, environment)
  assert (ORDERED in environment.get("XLA_FLAGS", "").split()) == ordered


def test_the_head_is_gathered_after_the_layers():
  """Beside them, as XLA puts it otherwise, devices may do either first, and wait for each other for ever."""
  assert ORDERED in os.environ["XLA_FLAGS"]  # of the process that runs the tests, by its 8 devices
  mesh, config = tiny.mesh_of((2, 2, 2)), tiny.make_config(n_layer=3)
  params = tiny.random_params(config)
  tokens = sharding.put_batch({"tokens": tiny.random_tokens(config, 8)}, mesh)["tokens"]
  whole = jax.device_put(params, param_shardings(config, mesh))
  with jax.set_mesh(mesh):
    text = jax.jit(lambda p, t: bind(config, p)(t)).lower(whole, tokens).compile().as_text()
  entry = text[text.index("ENTRY") :]
  order = re.findall(r" (while|all-gather)\(", entry)
  assert order.index("while") < len(order) - 1 - order[::-1].index("all-gather"), order
