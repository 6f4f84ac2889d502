"""What a kernel costs on a TPU: its code, its matrix products and its memory, whichever takes longest."""

import jax.numpy as jnp
import pytest

from igpt_jax.model.attention import tpu
from igpt_jax.parallel import hardware
from igpt_jax.prediction import bundles, hlo, topology
from support.hlo_text import entry

BUNDLES = """\
= control target key start
LH: loop header
PF: predicated region fallthrough
= control target key end
     0   :  { %s23 = inlined_call_operand.vmem [shape: bf16[4,64], index: 0, kind: input, shape index: {}] }
   0x1   :  { %s12_s10 = smov 0  }
   0x2 LB: > { %v1 = vld [vmem:[%s23] sm:$0xff]  ;;  %7 = vmatmul.bf16.gmra.mxu0 %v1 }
   0x3   : > { %p1_p11 = scmp.ge.s32.totalorder %s12_s10, 4  ;;  %199 = sbr.rel (%p1_p11) target = $region24 }
   0x4   : >> { %8 = vmatmul.bf16.vlgmr.msra.gmra.mxu0 %v2  ;;  %9 = vmatmul.bf16.gmra.mxu1 %v2 }
   0x5   : >> { %v5 = vadd.f32 %v4, %v3 }
   0x6 PF: > { %10 = vst [vmem:[%s23] sm:$0xff] %v5 }
  0x44   : >>> { %v6 = vmul.f32 %v5, %v5 }
0x12e4   :  { %19 = vsyncpa [#allocation4], 1 }
not a bundle
"""


def test_bundles_are_read_with_their_depth_region_and_matmuls(tmp_path):
  path = tmp_path / "1-fused_attention_forward.1-77-final_bundles.txt"
  path.write_text(BUNDLES)
  code = bundles.read(str(path))
  assert code.depth == [1, 1, 2, 2, 1, 3]  # what surrounds the grid's loop runs once: left out
  assert code.region == [None, None, 0, 0, None, None]
  assert code.matmuls == [1, 0, 2, 0, 0, 0]
  assert code.weighted(lambda depth, region: 1) == (6, 3)
  assert code.weighted(lambda depth, region: 10**depth) == (30 + 200 + 1000, 10 + 200)
  assert code.weighted(lambda depth, region: 0.5 if region == 0 else 1) == (5, 2)


def test_a_dump_finds_a_kernel_by_its_name_or_by_its_equals():
  dump = bundles.Dump()
  folder = dump.flags.split("--xla_jf_dump_to=")[1].split()[0]

  def write(name, lines):
    with open(f"{folder}/{name}", "w", encoding="utf-8") as file:
      file.write("   0x1   : > { nop }\n" * lines)

  write("10-fused_attention_forward.1-77-final_bundles.txt", 3)
  write("10-fused_attention_forward.1-78-schedule-analysis_final_bundles.txt", 9)
  assert len(dump.kernel("fused_attention_forward.1").depth) == 3
  assert len(dump.kernel("fused_attention_forward.5").depth) == 3  # equal ones are compiled once
  with pytest.raises(FileNotFoundError, match=r"fused_attention_backward\.1"):
    dump.kernel("fused_attention_backward.1")
  dump.clear()
  with pytest.raises(FileNotFoundError):
    dump.kernel("fused_attention_forward.1")


def test_code_in_loops_over_spans_runs_for_each_span_and_pair():
  def make(length, causal):
    return tpu.make_plan(
      2, 128, length, jnp.dtype("bfloat16"), causal=causal, backward=False, wide=False
    )

  whole = make(1024, True)
  assert whole.spans == 1
  assert [bundles.turns(whole, depth) for depth in (1, 2, 3)] == [1, 1, 0]
  for causal in (True, False):
    spans = make(4096, causal)
    assert spans.spans > 1
    pairs = sum(k < q if causal else True for q in range(spans.spans) for k in range(spans.spans))
    assert [bundles.turns(spans, depth) for depth in (1, 2, 3)] == [1, spans.spans, pairs]


def kernel(moved):
  """A forward pass of 6 images of 1,024 tokens, 4 heads of 128, as the compiler prints it."""
  cost = "" if moved is None else f'"cost_estimate":{{"flops":"1","bytes_accessed":"{moved}"}}'
  line = (
    "%fused_attention_forward.1 = (bf16[6,1024,512]{2,1,0}, f32[6,2,1,4,1024]{4,3,2,1,0}) custom-call(%x), "
    f'custom_call_target="tpu_custom_call", backend_config={{"custom_call_config":{{{cost}}}}}'
  )
  (operation,) = hlo.parse(entry(line)).computations["main"]
  return operation


@pytest.fixture
def costed(tmp_path):
  """Cycles of that kernel, whose code is BUNDLES: 5 bundles and 3 matrix products a step of the grid."""
  (tmp_path / "code.txt").write_text(BUNDLES)

  class Written(bundles.Dump):
    def kernel(self, name):
      return bundles.read(str(tmp_path / "code.txt"))

  def cycles(moved, cores=1, bandwidth=1e9):
    limits = bundles.Limits(clock=1e9, cores=cores, bandwidth=bandwidth)
    count = bundles.kernel_cycles(Written(), limits, head_dim=128, causal=True, narrow=True)
    return count(kernel(moved))

  return cycles


HEADS = tpu.make_plan(
  4, 128, 1024, jnp.dtype("bfloat16"), causal=True, backward=False, wide=False
).heads
STEPS = 6 * 4 // HEADS


def test_a_kernel_costs_the_longest_of_code_products_and_memory(costed):
  assert bundles.Limits(1e9, 1, 1e9).cycles(STEPS, (50, 3), moved=0) == STEPS * 50
  # Of one span: its code runs once in a step of the grid, that of pairs never. Products bound it.
  assert costed(moved=0) == STEPS * 3 * 4 > STEPS * 5
  assert costed(moved=10**6) == 10**6
  assert costed(moved=10**6, bandwidth=2e9) == 10**6 / 2


def test_two_cores_share_a_grid_and_one_memory(costed):
  assert costed(moved=0, cores=2) == costed(moved=0) / 2
  assert costed(moved=10**6, cores=2) == 10**6
  assert (
    bundles.Limits(1e9, 2, 1e9).cycles(7, (50, 0), moved=0) == 4 * 50
  )  # an odd step is one core's


def test_a_kernel_around_attention_costs_what_its_name_says(tmp_path):
  """Steps of its grid, turns of its loop over hidden units in each, and bytes that nothing hides."""
  two_loops = "".join(line for line in BUNDLES.splitlines(True) if ">>>" not in line)
  (tmp_path / "code.txt").write_text(two_loops)

  class Written(bundles.Dump):
    def kernel(self, name):
      return bundles.read(str(tmp_path / "code.txt"))

  def cycles(name, moved):
    cost = f'{{"flops":"1","bytes_accessed":"{moved}"}}'
    line = (
      f'%{name} = bf16[25,8192,512]{{2,1,0}} custom-call(%x), custom_call_target="tpu_custom_call", '
      f'backend_config={{"custom_call_config":{{"cost_estimate":{cost}}}}}'
    )
    (operation,) = hlo.parse(entry(line)).computations["main"]
    limits = bundles.Limits(clock=1e9, cores=1, bandwidth=1e9)
    return bundles.kernel_cycles(Written(), limits, head_dim=64, causal=True, narrow=False)(
      operation
    )

  # Three bundles with a product in every step, two with two in every turn; a product takes 4 cycles.
  assert cycles("block_finish_8_4_0.1", 0) == 8 * 4 * (1 + 4 * 2)
  assert cycles("block_qkv_backward_16_1_0", 0) == 16 * 4 * (1 + 1 * 2)
  assert cycles("block_finish_8_4_1000.1", 1000) == pytest.approx(8 * 4 * (1 + 4 * 2) + 1000)
  assert cycles("block_finish_8_4_1000.2", 10**6) == pytest.approx(10**6)
  (tmp_path / "code.txt").write_text(BUNDLES)
  with pytest.raises(KeyError):  # nobody knows how often a third loop turns
    cycles("block_finish_8_4_0.3", 0)


def test_a_kernel_that_hides_its_memory_is_refused(costed):
  with pytest.raises(
    ValueError, match=r"fused_attention_forward\.1: a kernel without a cost_estimate"
  ):
    costed(moved=None)


@pytest.mark.parametrize("kind", topology.GENERATIONS)
def test_products_at_full_rate_are_the_published_peak(kind):
  """An instruction multiplies 16 rows of bfloat16 by a square of weights, in four cycles of a core."""
  generation = topology.GENERATIONS[kind]
  (chip,) = {chip for chip in hardware.CHIPS.values() if chip.name == kind}
  side = 128 if generation.narrow else 256
  flops = 2 * 16 * side**2 / 4 * generation.clock * generation.cores
  assert flops == pytest.approx(chip.peak_flops, rel=0.005)
