"""Sampling beside transformers on this machine: whole images, pixel by pixel, the same weights.

  python tests/benchmarks/sampling_torch.py --sizes small,s --json sampling.json

transformers' ImageGPT does it by its `generate` with its cache. That both sides take the very same
pixels when greedy is checked before anything is timed. The sides take turns, so that what else the
machine does hits both; medians, and the spread from the fastest turn to the slowest. CPU time of all
threads is told too: on a machine that does other work it is the steadier figure, if each side has
one thread (`taskset -c 0`): several that wait for each other spin.

On a CPU ours has a device for each core, as the jobs do.

The roofline is what must be read for a token, the weights once per step and the cache's filled part,
over the speed at which this machine copies (bytes read and written), measured between the turns.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs its share of a GPU
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from igpt_jax.model.decoding import autoregressive
from igpt_jax.model.image_gpt import Params, count_params, init_params
from igpt_jax.model.model_config import PRESETS, ImageGPTConfig
from igpt_jax.parallel import hardware, sharding
from igpt_jax.pretrained import huggingface

GREEDY, PLAIN = autoregressive.SamplingConfig(temperature=0.0), autoregressive.SamplingConfig()
CHECKED_PIXELS = 24

# Draws the images, and blocks until they are there: tokens [B, T].
Side = Callable[[], np.ndarray]


def model_config(size: str, dtype: str) -> ImageGPTConfig:
  if size == "small":
    return ImageGPTConfig(n_layer=6, n_head=8, n_embd=256, dtype=dtype)
  preset = PRESETS[size]
  return ImageGPTConfig(
    n_layer=preset.n_layer, n_head=preset.n_head, n_embd=preset.n_embd, dtype=dtype
  )


def make_params(config: ImageGPTConfig) -> Params:
  params = jax.tree.map(np.asarray, init_params(config, jax.random.key(0)))
  # Zero at the start of training: every colour would be as likely.
  rng = np.random.default_rng(0)
  params["wtet"] = 0.2 * rng.standard_normal(params["wtet"].shape).astype(np.float32)
  return params


def make_ours(config, params, given, n_pixels: int, sampling, cache_dtype: str = "") -> Side:
  mesh = sharding.make_mesh()
  placed = jax.device_put(params, sharding.replicated(mesh))
  given = jax.device_put(given, sharding.sharding(mesh, "batch"))
  keys = jax.random.split(jax.random.key(1), len(given))

  def run(params, given, keys):
    progress = autoregressive.begin(config, params, given, keys, cache_dtype=cache_dtype)
    return autoregressive.extend(config, params, progress, n_pixels, sampling=sampling).tokens

  with jax.set_mesh(mesh):
    compiled = jax.jit(run).lower(placed, given, keys).compile()
  end = given.shape[1] + n_pixels
  return lambda: np.asarray(compiled(placed, given, keys))[:, :end]


def load_theirs(config, params):
  with tempfile.TemporaryDirectory() as directory:
    huggingface.write_directory(f"{directory}/model", config, params)
    dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    model = transformers.ImageGPTForCausalImageModeling.from_pretrained(
      f"{directory}/model", dtype=dtype
    )
  return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def make_theirs(config, model, given, n_pixels: int, greedy: bool) -> Side:
  start = torch.full((len(given), 1), config.n_vocab)
  context = torch.cat([start, torch.from_numpy(given).long()], dim=1).to(model.device)
  # As long as asked, whatever a token means to a text model.
  options = dict(max_new_tokens=n_pixels, min_new_tokens=n_pixels, use_cache=True)
  draw = {} if greedy else dict(temperature=1.0, top_k=0)

  def run() -> np.ndarray:
    with torch.no_grad():
      tokens = model.generate(
        input_ids=context,
        attention_mask=torch.ones_like(context),
        do_sample=not greedy,
        **options,
        **draw,
      )
    return tokens[:, 1:].cpu().numpy()

  return run


def timed(run: Callable) -> tuple[float, float]:
  """Seconds by the clock, and of CPU time."""
  began, cpu_began = time.perf_counter(), time.process_time()
  run()
  return time.perf_counter() - began, time.process_time() - cpu_began


def copy_speed() -> tuple[float, float]:
  """Bytes read and written per second of a copy by all of torch's threads: by the clock, by CPU time.

  Into memory that is there already: what a new page costs is another matter.
  """
  device = "cuda" if torch.cuda.is_available() else "cpu"
  source = torch.ones(2**26, device=device)
  target = torch.ones_like(source)

  def copy() -> None:
    target.copy_(source)
    if device == "cuda":
      torch.cuda.synchronize()

  copy()
  wall, cpu = zip(*(timed(copy) for _ in range(5)), strict=True)
  size = 2 * source.nbytes
  return size / statistics.median(wall), size / statistics.median(cpu)


def bytes_per_step(config: ImageGPTConfig, batch: int, n_given: int, cache: str = "") -> float:
  """Bytes that a step must read, on average: every matrix once, and the filled part of the cache."""
  item, cached = jnp.dtype(config.dtype).itemsize, jnp.dtype(cache or config.dtype).itemsize
  weights = count_params(config) - (config.n_vocab + config.n_positions) * config.n_embd  # tables
  positions = (n_given + 1 + config.n_positions) / 2
  return item * weights + cached * batch * positions * 2 * config.n_embd * config.n_layer


def check_same_pixels(config, params, model, batch: int) -> None:
  given = np.random.default_rng(1).integers(config.n_vocab, size=(batch, 8), dtype=np.int32)
  ours = make_ours(config, params, given, CHECKED_PIXELS, GREEDY)()
  theirs = make_theirs(config, model, given, CHECKED_PIXELS, greedy=True)()
  same = np.mean(ours == theirs)
  print(f"  greedy pixels that are the same: {same:.1%}", flush=True)
  if same < (0.8 if config.dtype == "bfloat16" else 1.0):
    raise SystemExit("the sides take different pixels")


def compare(size: str, arguments) -> list[dict]:
  config, batch = model_config(size, arguments.dtype), arguments.batch
  params = make_params(config)
  model = load_theirs(config, params)
  check_same_pixels(config, params, model, batch)
  length, half = config.n_positions, config.n_positions // 2
  nothing = np.zeros((batch, 0), np.int32)
  upper = np.random.default_rng(2).integers(config.n_vocab, size=(batch, half), dtype=np.int32)
  sides = {
    "igpt_jax": (make_ours(config, params, nothing, length, PLAIN), 0, ""),
    "igpt_jax, half given": (make_ours(config, params, upper, length - half, PLAIN), half, ""),
  }
  for cache_dtype in filter(None, arguments.caches.split(",")):
    run = make_ours(config, params, nothing, length, PLAIN, cache_dtype)
    sides[f"igpt_jax, {cache_dtype} cache"] = run, 0, cache_dtype
  sides["transformers"] = make_theirs(config, model, nothing, length, greedy=False), 0, ""
  taken = {name: [] for name in sides}
  copies = []
  for turn in range(arguments.repeats):
    for name, (run, _, _) in sides.items():
      taken[name].append(timed(run))
      copies.append(copy_speed())
    print(f"  turn {turn + 1} of {arguments.repeats}, load {os.getloadavg()[0]:.1f}", flush=True)
  copy_wall, copy_cpu = (statistics.median(each) for each in zip(*copies, strict=True))
  theirs = taken["transformers"]
  rows = []
  for name, (_, n_given, cache) in sides.items():
    wall, cpu = zip(*taken[name], strict=True)
    steps, need = length - n_given, bytes_per_step(config, batch, n_given, cache)
    rows.append({
      "size": size, "side": name, "batch": batch, "pixels": steps,
      "seconds": statistics.median(wall), "fastest": min(wall), "slowest": max(wall),
      "cpu_seconds": statistics.median(cpu),
      "tokens_per_second": batch * steps / statistics.median(wall),
      "speedup": statistics.median(t[0] / o for t, o in zip(theirs, wall, strict=True)),
      "speedup_cpu": statistics.median(t[1] / o for t, o in zip(theirs, cpu, strict=True)),
      "mb_per_step": need / 1e6,
      "roofline": need * steps / copy_wall / statistics.median(wall),
      "roofline_cpu": need * steps / copy_cpu / statistics.median(cpu),
      "copy_gb_per_second": copy_wall / 1e9,
      "copy_gb_per_cpu_second": copy_cpu / 1e9,
    })  # fmt: skip
  return rows


def print_rows(rows: list[dict]) -> None:
  print(
    "| size | side | pixels | s (fastest-slowest) | CPU s | tokens/s | × transformers, clock | CPU "
    "| MB/step | of roofline, clock | CPU |"
  )
  print("|---|---|--:|---|--:|--:|--:|--:|--:|--:|--:|")
  for row in rows:
    print(
      f"| {row['size']} | {row['side']} | {row['pixels']} | {row['seconds']:.2f} "
      f"({row['fastest']:.2f}-{row['slowest']:.2f}) | {row['cpu_seconds']:.2f} "
      f"| {row['tokens_per_second']:,.0f} | {row['speedup']:.2f} | {row['speedup_cpu']:.2f} "
      f"| {row['mb_per_step']:.0f} | {row['roofline']:.0%} | {row['roofline_cpu']:.0%} |"
    )
  print(
    f"copy: {rows[0]['copy_gb_per_second']:.1f} GB/s by the clock, "
    f"{rows[0]['copy_gb_per_cpu_second']:.1f} per CPU second"
  )


def main() -> None:
  on_gpu = torch.cuda.is_available()
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--sizes", default="s,m,l" if on_gpu else "small", help="small, s, m, l")
  parser.add_argument("--dtype", default="bfloat16" if on_gpu else "float32", help="of both sides")
  parser.add_argument("--batch", type=int, default=8)
  parser.add_argument("--repeats", type=int, default=3, help="turns that each side takes")
  parser.add_argument("--caches", default="", help="ours with these caches, too: int8,bfloat16")
  parser.add_argument("--json", help="write the figures here, too")
  arguments = parser.parse_args()
  cores = hardware.usable_cores()
  hardware.split_cpu(max(n for n in range(1, cores + 1) if arguments.batch % n == 0))
  if on_gpu != (jax.default_backend() == "gpu"):
    raise SystemExit(f"torch is on {'cuda' if on_gpu else 'cpu'}, jax on {jax.default_backend()}")
  machine = {
    "device": jax.devices()[0].device_kind,
    "devices": jax.device_count(),
    "processor": platform.processor() or platform.machine(),
    "usable_cores": cores,
    "dtype": arguments.dtype,
    "torch_threads": torch.get_num_threads(),
    "python": platform.python_version(),
    "load_at_start": os.getloadavg()[0],
  }
  if os.path.exists("/proc/cpuinfo"):
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
      models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    machine["processor"] = models[0] if models else machine["processor"]
  versions = {
    name: importlib.metadata.version(name)
    for name in ("jax", "jaxlib", "flax", "torch", "transformers")
  }
  print(", ".join(f"{k} {v}" for k, v in {**machine, **versions}.items()), flush=True)
  report = {"machine": machine, "versions": versions, "rows": []}
  for size in arguments.sizes.split(","):
    print(f"{size}:", flush=True)
    rows = compare(size, arguments)
    print_rows(rows)
    report["rows"] += rows
    if arguments.json:
      text = json.dumps(report, indent=1, ensure_ascii=False)
      pathlib.Path(arguments.json).write_text(text + "\n", encoding="utf-8")
  if not on_gpu:
    print("CPU: relative use only, and only within this run")


if __name__ == "__main__":
  main()
