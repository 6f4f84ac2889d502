"""Cost of a Pallas kernel on a TPU, from the scheduled code that the compiler dumps.

A kernel's custom call carries no estimate of its cycles. Its code is a list of VLIW bundles, one per cycle
when nothing stalls; this module counts every bundle as often as it runs. A kernel takes the largest of these,
of the time its matrix units are busy, and of the time its bytes need from and to memory.
"""

import dataclasses
import glob
import os
import re
import tempfile
from collections.abc import Callable

from igpt_jax.model.attention import tpu
from igpt_jax.prediction.hlo import Operation, dims_of

# Cycles of a core's matrix units for each of their instructions, which multiply 16 rows of bfloat16. It is what the
# published peaks come to on every generation: 16 · 2 · side² FLOPs · clock / (peak of a core) = 4.
_MATMUL_CYCLES = 4


@dataclasses.dataclass
class Code:
  """A kernel's bundles; every list has one entry per bundle.

  Attributes:
    depth: depth in loops; 1 is the body of the grid's loop.
    region: number of the guarded region (conditional) that it is in, if any.
    matmuls: number of matrix-unit instructions in it.
  """

  depth: list[int]
  region: list[int | None]
  matmuls: list[int]

  def weighted(self, weight: Callable[[int, int | None], float]) -> tuple[float, float]:
    """Returns the sums of bundles and of matrix-unit instructions, weighted by weight(depth, region)."""
    weights = [weight(d, r) for d, r in zip(self.depth, self.region, strict=True)]
    return sum(weights), sum(w * m for w, m in zip(weights, self.matmuls, strict=True))


def read(path: str) -> Code:
  """Reads the bundles of a dumped kernel.

  A guarded region extends from a conditional jump to the next fallthrough mark.
  """
  code, open_at, regions = Code([], [], []), None, 0
  with open(path, encoding="utf-8") as lines:
    for line in lines:
      bundle = re.match(r"\s*(?:0x[0-9a-f]+|0)\s+(\w\w)?\s*:((?: >+)?) \{(.*)", line)
      if not bundle:
        continue
      mark, depth, body = bundle.groups()
      if mark == "PF" and open_at is not None:
        for at in range(open_at, len(code.region)):
          code.region[at] = regions
        regions, open_at = regions + 1, None
      code.depth.append(depth.count(">"))
      code.region.append(None)
      code.matmuls.append(len(re.findall(r"\bvmatmul\.", body)))
      if "sbr.rel" in body:
        open_at = len(code.region)
  return code


class Dump:
  """Temporary folder that the compiler writes scheduled code to, while the process lives.

  libtpu reads its flags once, when it is loaded: create this before.
  """

  def __init__(self):
    self._folder = tempfile.TemporaryDirectory(prefix="igpt_jax_bundles_")

  @property
  def flags(self) -> str:
    """Flags for LIBTPU_INIT_ARGS."""
    return (
      f"--xla_jf_dump_to={self._folder.name} --xla_jf_dump_llo_pass_label_regex=.*final_bundles.*"
    )

  def clear(self) -> None:
    for path in glob.glob(os.path.join(self._folder.name, "*")):
      os.remove(path)

  def kernel(self, name: str) -> Code:
    """Returns the code of a kernel that was compiled since the folder was cleared.

    Equal kernels are compiled once, under the name of one of them. So without code of its own, a
    kernel has that of one whose name differs in the number alone.

    Raises:
      FileNotFoundError: there is none.
    """
    for pattern in (name, name.split(".")[0] + ".*"):
      paths = glob.glob(os.path.join(self._folder.name, f"*-{pattern}-*final_bundles.txt"))
      paths = [path for path in paths if "schedule-analysis" not in path]
      if paths:
        return read(max(paths, key=os.path.getmtime))
    raise FileNotFoundError(f"{name}: the compiler left no scheduled code")


@dataclasses.dataclass(frozen=True)
class Limits:
  """What bounds a kernel.

  Attributes:
    clock: cycles a second.
    cores: cores that share a kernel's grid; the compiler gives each a half of it, where there are two.
    bandwidth: bytes a second between memory and all cores.
  """

  clock: float
  cores: int
  bandwidth: float

  def cycles(self, steps: int, step: tuple[float, float], moved: float) -> float:
    """Returns the cycles of a kernel.

    Args:
      steps: steps of its grid.
      step: bundles and matrix-unit instructions of one of them.
      moved: bytes of the whole kernel to and from memory.
    """
    bundles, matmuls = step
    longest = -(-steps // self.cores)
    computed = longest * max(bundles, matmuls * _MATMUL_CYCLES)
    return max(computed, moved / self.bandwidth * self.clock)


def kernel_cycles(
  dump: Dump, limits: Limits, *, head_dim: int, causal: bool, narrow: bool
) -> Callable[[Operation], float]:
  """Returns the function for `schedule.predict` from a kernel of this project to its cycles.

  Args:
    dump: the folder with the compiled program's kernels.
    limits: what bounds them on their device.
    head_dim, causal: the model's.
    narrow: True if the chip's matrix units are 128 × 128.
  """
  counted: dict[str, tuple[float, float]] = {}

  around = block_cycles(dump, limits)

  def cycles(operation: Operation) -> float:
    if operation.name.startswith("block_"):
      return around(operation)
    backward = "backward" in operation.name
    dtype, dims = dims_of(operation.shape)
    batch, length, width = dims[-3:]
    n_head = width // head_dim
    plan = tpu.make_plan(
      n_head, head_dim, length, dtype, causal=causal, backward=backward, wide=not narrow
    )
    steps = batch * (n_head // plan.heads)
    if operation.name not in counted:
      code = dump.kernel(operation.name)
      counted[operation.name] = code.weighted(lambda depth, _: turns(plan, depth))
    return limits.cycles(steps, counted[operation.name], operation.moved)

  return cycles


def block_cycles(dump: Dump, limits: Limits) -> Callable[[Operation], float]:
  """Returns the function for `schedule.predict` from a kernel around attention (`block_tpu`) to its cycles.

  Weights are read before the first step and their gradients written after the last: nothing hides that. What runs
  in the first step alone, where sums begin, is counted with every step: up to 15% too much for iGPT-L.

  Raises:
    KeyError: code lies in a loop that the kernels don't have.
  """
  counted: dict[str, tuple[float, float]] = {}

  def cycles(operation: Operation) -> float:
    steps, inner, once = map(int, operation.name.split(".")[0].split("_")[-3:])
    if operation.name not in counted:
      runs = {0: 0, 1: 1, 2: inner}  # of code in a step, by its depth in loops
      counted[operation.name] = dump.kernel(operation.name).weighted(lambda depth, _: runs[depth])
    hidden = limits.cycles(steps, counted[operation.name], operation.moved - once)
    return hidden + once / limits.bandwidth * limits.clock

  return cycles


def turns(plan: tpu.Plan, depth: int) -> int:
  """Number of runs of code at this depth in one grid step of a fused attention kernel."""
  n = plan.spans
  pairs = n * (n - 1) // 2 if plan.causal else n * n
  return {1: 1, 2: n, 3: pairs}[depth]
