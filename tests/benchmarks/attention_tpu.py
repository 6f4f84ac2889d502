"""Fused attention against splash attention, jax's and tokamax', by the TPU compiler's own count.

  pip install "jax[tpu]" tokamax
  python tests/benchmarks/attention_tpu.py --json attention_tpu.json

Needs no TPU: libtpu compiles for chips that aren't there. For each kernel it dumps the scheduled
code, and this counts VLIW bundles (one a cycle when nothing stalls), each as often as it runs: once
per step of the grid, per active block, or per turn of a loop. All sides in one run:

- fwd, bwd: bundles of the kernels per head and sequence. Splash's are the best over block sizes.
- around: the compiler's estimated cycles of everything else that forward and backward need, from
  qkv [3, batch, length, width] to its gradient in the same layout: transposes, padding, sums.
- mxu: on chips with 128 × 128 matrix units (four a core, 16 rows of bfloat16 per instruction), the
  cycles that fwd + bwd keep them busy at the published peak. Bundles don't count a full queue, so a
  real run takes at least the larger of the two.

Predictions, good for comparing the sides; not readings from a chip.
"""

import argparse
import collections
import dataclasses
import functools
import glob
import importlib.metadata
import itertools
import json
import os
import pathlib
import platform
import re
import sys
import tempfile
from collections.abc import Iterator

DUMP = tempfile.TemporaryDirectory(prefix="bundles_")
os.environ.update(
  JAX_PLATFORMS="cpu",
  TPU_SKIP_MDS_QUERY="1",
  TPU_ACCELERATOR_TYPE="v5litepod-4",
  TPU_WORKER_HOSTNAMES="localhost",
  ALLOW_MULTIPLE_LIBTPU_LOAD="1",
  LIBTPU_INIT_ARGS=f"--xla_jf_dump_to={DUMP.name} "
  "--xla_jf_dump_llo_pass_label_regex=.*final_bundles.*",
)
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec  # noqa: E402

from igpt_jax.model.attention import tpu  # noqa: E402
from igpt_jax.prediction.bundles import Code, read, turns  # noqa: E402

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
NARROW = ("v5e", "v5p")
BATCH = 32  # as many rows as don't all fit in VMEM, as in training


@dataclasses.dataclass(frozen=True)
class Shape:
  name: str
  n_head: int
  head_dim: int
  length: int


SHAPES = (
  Shape("S 32²", 8, 64, 1024),
  Shape("M 32²", 8, 128, 1024),
  Shape("L 32²", 16, 96, 1024),
  Shape("L 48²", 16, 96, 2304),
  Shape("XL 32²", 24, 128, 1024),
  Shape("XL 64²", 24, 128, 4096),
)


def compile_for(chip: str, function, *shapes) -> tuple[dict[str, Code], float]:
  """The code of each Pallas kernel by name, and the estimated cycles of all other operations."""
  for old in glob.glob(f"{DUMP.name}/*"):
    os.remove(old)
  mesh = _mesh(chip)
  where = NamedSharding(mesh, PartitionSpec())
  avals = [jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where) for s in shapes]
  with jax.set_mesh(mesh):
    text = jax.jit(function, out_shardings=where).lower(*avals).compile().as_text()
  names = re.findall(r"%([\w.-]+) = [^\n]*custom_call_target=\"tpu_custom_call\"", text)
  kernels = {}
  for name in names:
    paths = [p for p in glob.glob(f"{DUMP.name}/*-{name}-*") if "schedule-analysis" not in p]
    path = next(p for p in paths if p.endswith("-final_bundles.txt"))
    kernels[name] = read(path)
  cycles = sum(int(c) for c in re.findall(r'"estimated_cycles":"(\d+)"', text))
  return kernels, float(cycles)


@functools.cache
def _mesh(chip: str) -> Mesh:
  device = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices[0]
  return Mesh(np.array([device]), ("x",), axis_types=(AxisType.Auto,))


def qkv_of(shape: Shape) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct((3, BATCH, shape.length, shape.n_head * shape.head_dim), jnp.bfloat16)


def grad_of(attend):
  """qkv and the output's gradient -> output and qkv's gradient."""

  def both(qkv, dout):
    out, pull = jax.vjp(attend, qkv)
    return out, pull(dout)[0]

  return both


def result(forward, backward, around: float, shape: Shape, chip: str, blocks) -> dict:
  found = {
    "fwd": round(forward[0]),
    "bwd": round(backward[0]),
    "around": round(around / (BATCH * shape.n_head)),
    "mxu": round((forward[1] + backward[1]) * 16 / 4) if chip in NARROW else None,
    "blocks": blocks,
  }
  return found | {"kernels": found["fwd"] + found["bwd"]}


def measure_fused(shape: Shape, chip: str) -> dict:
  attend = functools.partial(tpu.fused_attention, n_head=shape.n_head, causal=True)
  qkv = qkv_of(shape)
  kernels, around = compile_for(
    chip, grad_of(attend), qkv, jax.ShapeDtypeStruct(qkv.shape[1:], qkv.dtype)
  )
  counts = {}
  for name, code in kernels.items():
    backward = "backward" in name
    plan = tpu.make_plan(
      shape.n_head, shape.head_dim, shape.length, qkv.dtype, causal=True, backward=backward,
      wide=chip not in NARROW,
    )  # fmt: skip
    if plan.spans == 1:
      assert max(code.depth) == 1, "a loop within straight code"
    bundles, matmuls = code.weighted(lambda depth, _, plan=plan: turns(plan, depth))
    counts[backward] = (bundles / plan.heads, matmuls / plan.heads)
  return result(counts[False], counts[True], around, shape, chip, f"{plan.span}")


def splash_weights(code: Code, length: int, block_q: int, block_kv: int, by_kv: bool, dense: bool):
  """How often each region of a splash kernel runs for a head.

  The largest guarded region works on a block (tokamax has two: for blocks that the mask cuts, and
  for whole ones); the one before starts a row of blocks (a column, in the backward kernel), the one
  after ends it; the rest is in every step of the grid, which jax's takes for masked blocks too.
  """
  rows, columns = length // block_q, length // block_kv
  blocks = [(i, j) for i in range(rows) for j in range(columns)]
  active = [(i, j) for i, j in blocks if j * block_kv < (i + 1) * block_q]
  whole = sum((j + 1) * block_kv <= i * block_q + 1 for i, j in active)
  sizes = collections.Counter(r for r in code.region if r is not None)
  work = sorted(r for r in sizes if sizes[r] > 0.6 * max(sizes.values()))
  runs = dict.fromkeys(sizes, len(blocks) if dense else len(active))
  runs |= dict.fromkeys((work[0] - 1, work[-1] + 1), columns if by_kv else rows)
  if len(work) == 2:
    cut, uncut = sorted(work, key=sizes.get, reverse=True)
    runs |= {cut: len(active) - whole, uncut: whole}
  else:
    runs |= {work[0]: len(active)}
  runs[None] = len(blocks) if dense else len(active)
  return code.weighted(lambda depth, region: runs[region] if depth else 0)


def block_sizes(length: int) -> list[int]:
  return [n for n in (384, 512, 768, 1024, 1152) if length % n == 0]


def splash_candidates(shape: Shape, build) -> Iterator[tuple[str, dict]]:
  sizes = [n for n in block_sizes(shape.length) if n >= 512]
  schedulers = (False, True) if build is build_tokamax_splash else (False,)
  for q, kv, scheduler in itertools.product(sizes, sizes, schedulers):
    for compute in {kv} | {n for n in block_sizes(shape.length) if kv % n == 0 and 384 <= n <= 512}:
      label = f"{q}×{kv}/{compute}" + (" sched" if scheduler else "")
      yield label, {"q": q, "kv": kv, "compute": compute, "scheduler": scheduler}


def build_jax_splash(shape: Shape, b: dict):
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

  causal = masks.CausalMask((shape.length, shape.length))
  return kernel.make_splash_mha(
    masks.MultiHeadMask([causal] * shape.n_head),
    block_sizes=kernel.BlockSizes(
      block_q=b["q"], block_kv=b["kv"], block_kv_compute=b["compute"],
      block_q_dkv=b["q"], block_kv_dkv=b["kv"], block_kv_dkv_compute=b["compute"],
      use_fused_bwd_kernel=True,
    ),
    head_shards=1, q_seq_shards=1,
  )  # fmt: skip


def build_tokamax_splash(shape: Shape, b: dict):
  from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_kernel as kernel
  from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_mask as masks

  config = kernel.SplashConfig(
    block_q=b["q"], block_kv=b["kv"], block_kv_compute=b["compute"],
    block_q_dkv=b["q"], block_kv_dkv=b["kv"], block_kv_dkv_compute=b["compute"],
    use_experimental_scheduler=b["scheduler"],
  )  # fmt: skip
  return kernel.make_splash_mha(
    masks.CausalMask((shape.length, shape.length)), config=config, q_seq_shards=1
  )


def measure_splash(shape: Shape, chip: str, build, dense: bool) -> dict:
  """The best forward, and the best backward, over block sizes."""
  qkv = qkv_of(shape)
  dout = jax.ShapeDtypeStruct(qkv.shape[1:], qkv.dtype)
  best = {}
  for label, blocks in splash_candidates(shape, build):
    kernel = build(shape, blocks)

    def attend(qkv, kernel=kernel):
      split = qkv.reshape(3, BATCH, shape.length, shape.n_head, shape.head_dim)
      q, k, v = split.swapaxes(2, 3)
      out = jax.vmap(kernel)(q * shape.head_dim**-0.5, k, v)
      return out.swapaxes(1, 2).reshape(dout.shape)

    try:
      kernels, around = compile_for(chip, grad_of(attend), qkv, dout)
    except Exception as error:  # a block size that this chip can't hold: said, and passed over
      print(f"  {chip} {shape.name} {build.__name__} {label}: {str(error)[:90]!r}", file=sys.stderr)
      continue
    for name, code in kernels.items():
      side = "fwd" if "fwd" in name else "bwd"
      count = splash_weights(code, shape.length, blocks["q"], blocks["kv"], side == "bwd", dense)
      if side not in best or count[0] < best[side][0][0]:
        best[side] = (count, around, label)
  blocks = f"{best['fwd'][2]}, {best['bwd'][2]}"
  return result(best["fwd"][0], best["bwd"][0], best["bwd"][1], shape, chip, blocks)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--chips", default=",".join(TOPOLOGIES))
  parser.add_argument("--shapes", default=",".join(s.name for s in SHAPES))
  parser.add_argument("--json", help="write the figures here, too")
  arguments = parser.parse_args()
  packages = ("jax", "jaxlib", "libtpu", "tokamax")
  versions = {name: importlib.metadata.version(name) for name in packages}
  machine = f"{platform.machine()}, {os.cpu_count()} CPUs, no TPU"
  sides = {
    "fused": measure_fused,
    "splash (jax)": functools.partial(measure_splash, build=build_jax_splash, dense=True),
    "splash (tokamax)": functools.partial(measure_splash, build=build_tokamax_splash, dense=False),
  }
  print(f"{machine}; {', '.join(f'{k} {v}' for k, v in versions.items())}; bfloat16, causal")
  print(
    f"| {'chip':5} | {'shape':6} | {'side':16} |    fwd |    bwd | × fused | around | × fused |"
    "    mxu | blocks |"
  )
  print("|---|---|---|--:|--:|--:|--:|--:|--:|---|")
  rows = []
  for chip in arguments.chips.split(","):
    for shape in SHAPES:
      if shape.name not in arguments.shapes.split(","):
        continue
      fused = None
      for side, measure in sides.items():
        found = measure(shape, chip)
        fused = fused or found
        rows.append({"chip": chip, **dataclasses.asdict(shape), "side": side, **found})
        kernels = found["kernels"] / fused["kernels"]
        whole = (found["kernels"] + found["around"]) / (fused["kernels"] + fused["around"])
        print(
          f"| {chip:5} | {shape.name:6} | {side:16} | {found['fwd']:6} | {found['bwd']:6} | "
          f"{kernels:7.2f} | {found['around']:6} | {whole:7.2f} | {found['mxu'] or '':6} | "
          f"{found['blocks']} |",
          flush=True,
        )
        if arguments.json:
          report = {"machine": machine, "versions": versions, "unit": "per head", "rows": rows}
          text = json.dumps(report, indent=1, ensure_ascii=False)
          pathlib.Path(arguments.json).write_text(text + "\n")


if __name__ == "__main__":
  main()
