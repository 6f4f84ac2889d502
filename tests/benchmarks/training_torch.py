"""Training step and forward loss of this project against transformers' ImageGPT, in one run.

  python -m venv venv && . venv/bin/activate
  pip install -e . torch transformers          # on a GPU: -e '.[cuda]'; torch.compile wants a C++ compiler
  python tests/benchmarks/training_torch.py --json training_torch.json
  python tests/benchmarks/training_torch.py --sizes s,m,l      # on a GPU

The same weights, tokens and optimizer (Adam) on both sides, on the device that is there: float32 on a
CPU, bfloat16 (torch: autocast, float32 weights) on CUDA. transformers runs as it is (eager), with its
attention handed to torch's scaled_dot_product_attention, and both of these under torch.compile; that
every side computes the same loss is checked before anything is timed. The sides take turns, so that
what else the machine does hits all of them; medians, and the spread from the fastest turn to the
slowest. CPU time of all threads is told too: on a machine that does other work it is the steadier
figure, though threads that wait for others may spin in it. transformers' model is the same up to biases (zero here), which it trains and ours doesn't have.
"""

import argparse
import dataclasses
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
import numpy as np
import torch
import transformers

from igpt_jax.model.image_gpt import count_params, init_params
from igpt_jax.model.model_config import PRESETS, ImageGPTConfig
from igpt_jax.parallel import hardware, sharding
from igpt_jax.pretrained import huggingface
from igpt_jax.training import compilation, objectives, optimizer, state, step

LEARNING_RATE, BETAS = 1e-4, (0.9, 0.95)


@dataclasses.dataclass
class Side:
  """`train` and `forward` do one step and block until it is done; they return the loss."""

  name: str
  parameters: int
  train: Callable[[], float]
  forward: Callable[[], float]


def model_config(size: str, attention: str) -> tuple[ImageGPTConfig, int]:
  """A model and the batch that it is compared at."""
  if size == "small":
    return ImageGPTConfig(n_layer=6, n_head=8, n_embd=256, attention=attention, remat="names"), 8
  preset = PRESETS[size]
  batch = {"s": 32, "m": 8, "l": 4}[size]
  config = ImageGPTConfig(
    n_layer=preset.n_layer,
    n_head=preset.n_head,
    n_embd=preset.n_embd,
    dtype="bfloat16" if torch.cuda.is_available() else "float32",
    remat=preset.remat,
    attention=attention,
  )
  return config, batch


def make_ours(config: ImageGPTConfig, params, tokens: np.ndarray) -> Side:
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  settings = optimizer.OptimizerConfig(
    learning_rate=LEARNING_RATE, steps=10**6, schedule="constant", b1=BETAS[0], b2=BETAS[1]
  )
  tx, schedule = optimizer.make_optimizer(settings), optimizer.make_schedule(settings)
  objective = objectives.make_objective("autoregressive")
  shardings = state.state_shardings(config, tx, mesh)
  with jax.set_mesh(mesh):
    placed = jax.device_put(params, state.param_shardings(config, mesh))
    held = [state.make_state(config, tx, 0, mesh, placed)]
    batch = sharding.put_batch({"tokens": tokens}, mesh)
    compiled = compilation.compile_step(
      step.make_train_step(config, objective, tx, schedule),
      state.abstract_state(config, tx),
      shardings,
      batch,
    )
    mask = {"mask": np.ones(len(tokens), np.float32), "index": np.arange(len(tokens))}
    whole = {**batch, **sharding.put_batch(mask, mesh)}
    evaluate = jax.jit(step.make_eval_step(config, objective))
    evaluate = evaluate.lower(held[0].params, whole, jax.random.key(0)).compile()

  def train() -> float:
    held[0], metrics = compiled(held[0], batch)
    return float(metrics["loss"])

  def forward() -> float:
    return float(evaluate(held[0].params, whole, jax.random.key(0))["nats"]) / len(tokens)

  return Side("igpt_jax", count_params(config), train, forward)


def attend_by_sdpa(self, query, key, value, attention_mask=None):
  """In place of transformers' ImageGPTAttention._attn; its scale is SDPA's default."""
  assert attention_mask is None and self.scale_attn_weights
  assert not self.scale_attn_by_inverse_layer_idx
  out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
  return out, None


def make_theirs(config: ImageGPTConfig, params, tokens: np.ndarray, compiled: bool) -> list[Side]:
  """All sides share one set of weights and moments: three of L would not fit a GPU."""
  device = "cuda" if torch.cuda.is_available() else "cpu"
  with tempfile.TemporaryDirectory() as directory:
    huggingface.write_directory(f"{directory}/model", config, params)
    model = transformers.ImageGPTForCausalImageModeling.from_pretrained(f"{directory}/model")
  model = model.to(device).train()
  adam = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, betas=BETAS, fused=True)
  targets = torch.from_numpy(tokens).long().to(device)
  start = torch.full((len(tokens), 1), config.n_vocab, device=device)
  inputs = torch.cat([start, targets[:, :-1]], dim=1)
  attentions = [block.attn for block in model.transformer.h]
  eager_attention = type(attentions[0])._attn
  autocast = config.dtype == "bfloat16"

  def loss_of() -> torch.Tensor:
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
      logits = model(input_ids=inputs, use_cache=False).logits
    # Theirs drops the first pixel (its label is shifted away); ours counts it.
    return torch.nn.functional.cross_entropy(
      logits.float().reshape(-1, config.n_vocab), targets.reshape(-1)
    )

  def make(name: str, attention: Callable, compile_it: bool) -> Side:
    loss_function = torch.compile(loss_of) if compile_it else loss_of

    def use() -> None:
      for module in attentions:
        module._attn = attention.__get__(module)

    def train() -> float:
      use()
      adam.zero_grad(set_to_none=True)
      loss = loss_function()
      loss.backward()
      adam.step()
      return loss.item()

    def forward() -> float:
      use()
      with torch.no_grad():
        return loss_function().item()

    return Side(name, model.num_parameters(), train, forward)

  return [
    make(f"transformers {name}{' compiled' if compile_it else ''}", attention, compile_it)
    for compile_it in ((False, True) if compiled else (False,))
    for name, attention in (("eager", eager_attention), ("SDPA", attend_by_sdpa))
  ]


def timed(run: Callable[[], float], steps: int) -> tuple[float, float]:
  """Seconds per step, by the clock and of CPU time."""
  began, cpu_began = time.perf_counter(), time.process_time()
  for _ in range(steps):
    run()
  return (time.perf_counter() - began) / steps, (time.process_time() - cpu_began) / steps


def compare(size: str, arguments) -> dict:
  config, batch = model_config(size, arguments.attention)
  batch = arguments.batch or batch
  rng = np.random.default_rng(0)
  tokens = rng.integers(config.n_vocab, size=(batch, config.n_positions), dtype=np.int32)
  params = jax.tree.map(np.asarray, init_params(config, jax.random.key(0)))
  # Zero at the start of training: every model would give the same loss.
  params["wtet"] = 0.2 * rng.standard_normal(params["wtet"].shape).astype(np.float32)
  sides = [
    make_ours(config, params, tokens),
    *make_theirs(config, params, tokens, not arguments.no_compile),
  ]
  losses = {}
  for side in sides:
    losses[side.name] = side.forward()
    print(
      f"  {side.name}: loss {losses[side.name]:.6f}, {side.parameters:,} parameters", flush=True
    )
  tolerance = 1e-5 if config.dtype == "float32" else 2e-2
  if max(losses.values()) - min(losses.values()) > tolerance:
    raise SystemExit(f"the sides compute different losses: {losses}")
  for side in sides:
    for work in ("train", "forward"):  # compiles
      getattr(side, work)()
  taken = {(side.name, work): [] for side in sides for work in ("train", "forward")}
  for turn in range(arguments.repeats):
    print(f"  turn {turn + 1} of {arguments.repeats}", flush=True)
    for side in sides:
      for work in ("train", "forward"):
        taken[side.name, work].append(timed(getattr(side, work), arguments.steps))
  peak = hardware.chip_of(jax.devices()[0])
  rows = []
  for (name, work), turns in taken.items():
    seconds, cpu_seconds = zip(*turns, strict=True)
    median = statistics.median(seconds)
    ours = statistics.median(wall for wall, _ in taken["igpt_jax", work])
    flops = compilation.flops_per_image(config) * batch * (1 if work == "train" else 1 / 3)
    rows.append({
      "size": size,
      "side": name,
      "work": work,
      "batch": batch,
      "seconds": median,
      "fastest": min(seconds),
      "slowest": max(seconds),
      "cpu_seconds": statistics.median(cpu_seconds),
      "tokens_per_second": batch * config.n_positions / median,
      "tflops_per_second": flops / median / 1e12,
      "mfu": flops / median / peak.peak_flops if peak else None,
      "times_ours": median / ours,
    })  # fmt: skip
  return {"model": dataclasses.asdict(config), "losses": losses, "rows": rows}


def print_rows(rows: list[dict]) -> None:
  print(
    "| size | side | work | s/step (fastest-slowest) | CPU s | tokens/s | TFLOP/s | MFU | its time / ours |"
  )
  print("|---|---|---|---|--:|--:|--:|--:|--:|")
  for row in rows:
    mfu = "" if row["mfu"] is None else f"{row['mfu']:.1%}"
    print(
      f"| {row['size']} | {row['side']} | {row['work']} | {row['seconds']:.3f} "
      f"({row['fastest']:.3f}-{row['slowest']:.3f}) | {row['cpu_seconds']:.2f} | {row['tokens_per_second']:,.0f} | "
      f"{row['tflops_per_second']:.3f} | {mfu} | {row['times_ours']:.2f} |"
    )


def main() -> None:
  on_gpu = torch.cuda.is_available()
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--sizes", default="s,m,l" if on_gpu else "small", help="small, s, m, l")
  parser.add_argument("--batch", type=int, default=0, help="0: 8 on a CPU; 32, 8, 4 for s, m, l")
  parser.add_argument("--repeats", type=int, default=5, help="turns that each side takes")
  parser.add_argument("--steps", type=int, default=10 if on_gpu else 1, help="in each turn")
  parser.add_argument("--attention", default="auto", help="ours: an implementation")
  parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
  parser.add_argument("--json", help="write the figures here, too")
  arguments = parser.parse_args()
  if on_gpu != (jax.default_backend() == "gpu"):
    raise SystemExit(f"torch is on {'cuda' if on_gpu else 'cpu'}, jax on {jax.default_backend()}")
  packages = ("jax", "jaxlib", "flax", "torch", "transformers", "igpt_jax")
  found = {}
  for name in packages:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
      found[name] = "this checkout"
  processor = platform.processor() or platform.machine()
  if os.path.exists("/proc/cpuinfo"):
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
      models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = models[0] if models else processor
  machine = {
    "device": jax.devices()[0].device_kind,
    "processor": processor,
    "cores": os.cpu_count(),
    "torch_threads": torch.get_num_threads(),
    "python": platform.python_version(),
    "load_at_start": os.getloadavg()[0],
  }
  print(", ".join(f"{k} {v}" for k, v in {**machine, **found}.items()), flush=True)
  report = {"machine": machine, "versions": found, "sizes": {}}
  for size in arguments.sizes.split(","):
    print(f"{size}:", flush=True)
    report["sizes"][size] = compare(size, arguments)
    print_rows(report["sizes"][size]["rows"])
    if arguments.json:
      text = json.dumps(report, indent=1, ensure_ascii=False)
      pathlib.Path(arguments.json).write_text(text + "\n", encoding="utf-8")
  if not on_gpu:
    print("CPU: relative use only, and only within this run")


if __name__ == "__main__":
  main()
