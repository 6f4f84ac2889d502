"""Models small enough to test with, meshes for them, and parameters that make every part matter."""

import collections
import contextlib
import dataclasses
import functools
import os
import re
from unittest import mock

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from igpt_jax.config import read
from igpt_jax.config.fields import Settings, base
from igpt_jax.model.image_gpt import Params, abstract_params
from igpt_jax.model.model_config import ImageGPTConfig
from igpt_jax.parallel import hardware
from igpt_jax.parallel.sharding import make_mesh
from igpt_jax.training.state import TrainState

# Compiling small programs is most of these tests' time: these emitters triple it.
_COMPILER_OPTIONS = {"xla_cpu_use_fusion_emitters": False}

# Every option that the paper's model hasn't.
ALL_OPTIONS = {
  "positions": "rope2d", "qk_norm": True, "value_embeddings": True, "x0_skip": True
}  # fmt: skip

MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)]
SLICES = [(2, 4, 1, 1), (2, 1, 4, 1), (2, 1, 2, 2), (4, 2, 1, 1)]  # each the shape within one


@functools.cache
def _compiler_options() -> dict[str, bool] | None:
  """None on an accelerator, and where XLA doesn't know the option."""
  if jax.default_backend() != "cpu":
    return None
  try:
    jax.jit(lambda x: x, compiler_options=_COMPILER_OPTIONS)(0)
  except jax.errors.JaxRuntimeError as error:
    if "No such compile option" not in str(error):
      raise
    return None
  return _COMPILER_OPTIONS


def jit(function, **settings):
  """`jax.jit` that compiles quickly; what a program computes is the same."""
  return jax.jit(function, compiler_options=_compiler_options(), **settings)


def make_config(**changes) -> ImageGPTConfig:
  settings = dict(n_layer=2, n_head=2, n_embd=16, n_vocab=11, n_positions=16)
  return ImageGPTConfig(**{**settings, **changes})


@functools.cache
def random_params(config: ImageGPTConfig, seed: int = 0) -> Params:
  """Nothing is zero or constant, as the output table and the gains are at the start of training."""
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    noise = rng.standard_normal(leaf.shape).astype(np.float32)
    if path[-1].key == "g":
      return 1 + 0.2 * noise
    return noise * (0.5 if path[0].key in ("wte", "wpe", "wtet", "sos") else leaf.shape[-1] ** -0.5)

  return jax.tree_util.tree_map_with_path(draw, abstract_params(config))


def settings_of(config=None, changes=None) -> Settings:
  """Settings that `main` reads from a config, or from the defaults, with changes by "part.field"."""
  config = base() if config is None else config
  config.update_from_flattened_dict(changes or {})
  return read.settings_of(config)


def changed(settings: Settings, changes: dict) -> Settings:
  """The settings with other values, by "part.field"."""
  config = base()
  config.update(dataclasses.asdict(settings))
  return settings_of(config, changes)


def random_tokens(config: ImageGPTConfig, batch: int, seed: int = 0) -> np.ndarray:
  rng = np.random.default_rng(seed + 1_000)
  shape = (batch, *config.tokens.shape(config.n_positions))
  return rng.integers(config.n_vocab, size=shape, dtype=np.int32)


def random_state(abstract: TrainState, step: int, shardings: TrainState) -> TrainState:
  """Every leaf random, the moments and the counters too; but for the step."""
  rng = np.random.default_rng(step)

  def draw(leaf):
    if leaf.dtype == np.float32:
      return rng.standard_normal(leaf.shape).astype(np.float32)
    return rng.integers(2**30, size=leaf.shape).astype(leaf.dtype)

  state = dataclasses.replace(jax.tree.map(draw, abstract), step=np.asarray(step, np.int32))
  return jax.device_put(state, shardings)


def mesh_of(shape: tuple[int, ...] = (1, 1, 1)) -> Mesh:
  """A mesh over the first devices; skips the test where there are too few.

  Four numbers are slices, of consecutive devices, and the axes within one.
  """
  wanted = int(np.prod(shape))
  if jax.device_count() < wanted:
    pytest.skip(f"needs {wanted} devices, there are {jax.device_count()}")
  devices = jax.devices()[:wanted]
  if len(shape) == 3:
    return make_mesh(*shape, devices=devices)
  with in_slices(*devices, slices=shape[0]):
    return make_mesh(*shape[1:], slices=shape[0], devices=devices)


@dataclasses.dataclass(frozen=True)
class Chip:
  """A device that isn't here. Its platform is one whose devices may come in any order, whatever its kind."""

  id: int
  device_kind: str = "TPU v5 lite"
  platform: str = "gpu"
  process_index: int = 0


@contextlib.contextmanager
def in_slices(*devices: jax.Device, slices: int = 2):
  """Has devices say that they are in slices: the first of them in slice 0, the last in the last."""
  per_slice = len(devices) // slices
  held = {device: at // per_slice for at, device in enumerate(devices)}
  with mock.patch.object(hardware, "slice_index", held.get):
    yield


def on_one_device(job, settings: Settings, workdir: str) -> None:
  """Runs a job as most people do, whose computer has one device; this process has eight virtual ones."""
  job.run(settings, workdir, mesh=mesh_of())


@functools.cache
def tpu_devices(topology: str, slices: int = 1) -> list[jax.Device]:
  """Devices of slices that aren't here, for tests that compile for them."""
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  from jax.experimental import topologies

  several = {"num_slices": slices} if slices > 1 else {}
  return topologies.get_topology_desc(platform="tpu", topology_name=topology, **several).devices


def leaf_names(tree) -> dict:
  """The leaves of a tree by their path, "params/blocks/attn/qkv"."""
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {
    "/".join(re.sub(r"[\[\]'.]", "", str(key)) for key in path): leaf for path, leaf in leaves
  }


@contextlib.contextmanager
def compilations():
  """Counts the programs that are compiled meanwhile, by the names of their functions.

  A program's own count of its signatures is another thing: jax may keep several for one program.
  """
  found: collections.Counter[str] = collections.Counter()
  listening = [True]

  def heard(event, seconds, **about):
    if listening and event == "/jax/core/compile/backend_compile_duration":
      found[about["fun_name"].removeprefix("jit(").removesuffix(")")] += 1

  jax.monitoring.register_event_duration_secs_listener(heard)
  try:
    yield found
  finally:
    listening.clear()


class Killed(BaseException):
  """What a stand-in raises where a process would be killed."""
