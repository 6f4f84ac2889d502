"""What a Pallas kernel costs on a TPU, from the scheduled code that the compiler dumps.

A kernel's custom call carries no estimate. Its code is a list of VLIW bundles, one a cycle when
nothing stalls: counted here, each as often as it runs.
"""

import collections
import dataclasses
import glob
import os
import re
import tempfile
from collections.abc import Callable

from igpt_jax.model.attention import tpu
from igpt_jax.prediction.hlo import Operation, dims_of

# Rows of bfloat16 per instruction of a matrix unit, and units a core, where they are 128 × 128.
_MATMUL_ROWS, _MATRIX_UNITS = 16, 4


@dataclasses.dataclass
class Code:
  """A kernel's bundles: how deep in loops each is, and in which guarded region, if any.

  Attributes:
    depth: 1 is the body of the grid's loop.
    region: number of the conditional that a bundle is in.
    matmuls: instructions of the matrix units in it.
  """

  depth: list[int]
  region: list[int | None]
  matmuls: list[int]

  def weighted(self, weight: Callable[[int, int | None], float]) -> tuple[float, float]:
    """Bundles and matrix-unit instructions, each as often as `weight` of its place says."""
    weights = [weight(d, r) for d, r in zip(self.depth, self.region, strict=True)]
    return sum(weights), sum(w * m for w, m in zip(weights, self.matmuls, strict=True))


def read(path: str) -> Code:
  """The bundles in the grid's loop; what surrounds it runs once.

  A guarded region is what a conditional jump skips straight to the next fallthrough mark.
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
  """The folder that the compiler writes scheduled code to, for as long as the process lives.

  libtpu reads its flags once, when it is loaded: make this before.
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
    """The code of a kernel that was compiled since the folder was cleared.

    Equal kernels are compiled once, under the name of one of them: a kernel's own code, or that of
    one which is called the same but for its number.

    Raises:
      FileNotFoundError: there is none.
    """
    for pattern in (name, name.split(".")[0] + ".*"):
      paths = glob.glob(os.path.join(self._folder.name, f"*-{pattern}-*final_bundles.txt"))
      paths = [path for path in paths if "schedule-analysis" not in path]
      if paths:
        return read(max(paths, key=os.path.getmtime))
    raise FileNotFoundError(f"{name}: the compiler left no scheduled code")


def attention_cycles(
  dump: Dump, *, head_dim: int, causal: bool, narrow: bool
) -> Callable[[Operation], float]:
  """Cycles of this project's attention kernels, for `schedule.predict`.

  Args:
    dump: with what the program left.
    head_dim, causal: of the model.
    narrow: the chip's matrix units are 128 × 128; their instructions then bound a kernel from below,
      as bundles don't count a full queue.
  """
  counted: dict[str, float] = collections.defaultdict(float)

  def of(operation: Operation) -> float:
    backward = "backward" in operation.name
    dtype, dims = dims_of(operation.shape)
    batch, length, width = dims[-3:]
    n_head = width // head_dim
    plan = tpu.make_plan(
      n_head, head_dim, length, dtype, causal=causal, backward=backward, wide=not narrow
    )
    steps = batch * (n_head // plan.heads)
    if operation.name not in counted:
      bundles, matmuls = dump.kernel(operation.name).weighted(lambda depth, _: turns(plan, depth))
      least = matmuls * _MATMUL_ROWS / _MATRIX_UNITS if narrow else 0
      counted[operation.name] = max(bundles, least)
    return steps * counted[operation.name]

  return of


def turns(plan: tpu.Plan, depth: int) -> int:
  """How often code at a depth runs in one step of the grid of a fused attention kernel."""
  n = plan.spans
  pairs = n * (n - 1) // 2 if plan.causal else n * n
  return {1: 1, 2: n, 3: pairs}[depth]
