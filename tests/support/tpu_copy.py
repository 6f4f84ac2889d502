"""A kernel that only copies, compiled for a TPU that isn't here: its code, and what it is said to cost.

python -m support.tpu_copy TOPOLOGY      # prints JSON
"""

import json
import sys

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec

from igpt_jax.parallel import sharding
from igpt_jax.prediction import hlo
from igpt_jax.prediction.topology import open_topology

STEPS, ROWS, WIDTH = 32, 256, 1024
MOVED = 2 * 4 * STEPS * ROWS * WIDTH  # bytes, float32 read and written


def copied(x):
  block = pl.BlockSpec((ROWS, WIDTH), lambda i: (i, 0))
  return pl.pallas_call(
    lambda x_ref, out_ref: out_ref.__setitem__(..., x_ref[...]),
    grid=(STEPS,),
    in_specs=[block],
    out_specs=block,
    out_shape=x,
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
    cost_estimate=pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=MOVED),
    name="copy_rows",
  )(x)


def main(name: str) -> dict:
  topology = open_topology(name)
  mesh = sharding.make_mesh(devices=list(topology.devices))
  everywhere = PartitionSpec()
  x = jax.ShapeDtypeStruct((STEPS * ROWS, WIDTH), jnp.float32, sharding=sharding.replicated(mesh))
  with jax.set_mesh(mesh):
    copy = jax.jit(
      jax.shard_map(copied, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False)
    )
    program = hlo.parse(copy.lower(x).compile().as_text())
  (kernel,) = [o for o in program.computations[program.entry] if o.target == "tpu_custom_call"]
  step = topology.dump.kernel(kernel.name).weighted(lambda depth, _: depth == 1)
  return {
    "moved": kernel.moved,
    "step": step,
    "seconds": topology.limits.cycles(STEPS, step, kernel.moved) / topology.generation.clock,
    "seconds_of_code": topology.limits.cycles(STEPS, step, 0) / topology.generation.clock,
  }


if __name__ == "__main__":
  print(json.dumps(main(sys.argv[1])))
