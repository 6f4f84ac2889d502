"""From a compiled program's text to memory, collectives and seconds; and how a slice is planned."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from igpt_jax.errors import UserError
from igpt_jax.parallel import hardware, sharding, tpu_types
from igpt_jax.prediction import forecast, hlo, plan, schedule, topology
from igpt_jax.prediction.schedule import Links, Network, replica_group
from igpt_jax.training import arrangement, compilation
from igpt_jax.training.objectives import make_objective
from igpt_jax.training.optimizer import OptimizerConfig, make_optimizer, make_schedule
from igpt_jax.training.state import abstract_state, state_shardings
from igpt_jax.training.step import make_train_step
from support import collectives, tiny
from support.hlo_text import entry

# What XLA prints for a TPU, shortened: types with layouts and memory spaces, tuples counted through,
# a scan as a while loop, costs in backend_config.
SCAN = """\
HloModule jit_train_step, is_scheduled=true, input_output_alias={ {0}: (0, {}, may-alias) }

%region_1.1 (reduce_sum.65: f32[], reduce_sum.66: f32[]) -> f32[] {
  %reduce_sum.65 = f32[]{:T(128)} parameter(0), metadata={op_name="jit(train_step)/reduce_sum"}
  %reduce_sum.66 = f32[]{:T(128)} parameter(1)
  ROOT %reduce_sum.67 = f32[]{:T(128)} add(%reduce_sum.65, %reduce_sum.66)
}

%fused_computation.2 (param_0.6: bf16[4,64]) -> f32[4,64] {
  %param_0.6 = bf16[4,64]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  ROOT %convert.1 = f32[4,64]{1,0:T(4,128)} convert(%param_0.6)
}

%body.3 (p: (s32[], bf16[4,64], f32[2,3], f32[8], f32[8], /*index=5*/f32[8,2])) -> (s32[], bf16[4,64], f32[2,3], f32[8], f32[8], /*index=5*/f32[8,2]) {
  %p = (s32[]{:T(128)}, bf16[4,64]{1,0:T(8,128)(2,1)S(1)}, f32[2,3]{1,0}, f32[8]{0}, f32[8]{0}, /*index=5*/f32[8,2]{1,0}) parameter(0)
  %gte.1 = bf16[4,64]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%p), index=1
  %fusion.9 = f32[4,64]{1,0:T(4,128)} fusion(%gte.1), kind=kLoop, calls=%fused_computation.2, metadata={op_name="jit(train_step)/jvp()/while/body/closed_call/mul" stack_frame_id=198}, backend_config={"flag_configs":[],"estimated_cycles":"1000","iteration_bounds":["1"]}
  ROOT %tuple.4 = (s32[]{:T(128)}, bf16[4,64]{1,0:T(8,128)(2,1)S(1)}, f32[2,3]{1,0}, f32[8]{0}, f32[8]{0}, /*index=5*/f32[8,2]{1,0}) tuple(%p, %gte.1, %fusion.9, %fusion.9, %fusion.9, /*index=5*/%fusion.9)
}

%condition.5 (q: (s32[], bf16[4,64], f32[2,3], f32[8], f32[8], /*index=5*/f32[8,2])) -> pred[] {
  %constant.316.clone.1 = s32[]{:T(128)} constant(24), backend_config={"flag_configs":[]}
  %q = (s32[]{:T(128)}, bf16[4,64]{1,0:T(8,128)(2,1)S(1)}, f32[2,3]{1,0}, f32[8]{0}, f32[8]{0}, /*index=5*/f32[8,2]{1,0}) parameter(0)
  %gte.6 = s32[]{:T(128)} get-tuple-element(%q), index=0
  ROOT %lt.91 = pred[]{:T(512)} compare(%gte.6, %constant.316.clone.1), direction=LT
}

ENTRY %main.7 (x: bf16[4,64]) -> f32[] {
  %x = bf16[4,64]{1,0:T(8,128)(2,1)} parameter(0), sharding={devices=[4,1]<=[4]}
  %constant.2 = s32[]{:T(128)} constant(START)
  %copy.3 = s32[]{:T(128)} copy(%constant.2)
  %tuple.8 = (s32[]{:T(128)}, bf16[4,64]{1,0:T(8,128)(2,1)S(1)}, f32[2,3]{1,0}, f32[8]{0}, f32[8]{0}, /*index=5*/f32[8,2]{1,0}) tuple(%copy.3, %x, %x, %x, %x, /*index=5*/%x)
  %while.48 = (s32[]{:T(128)}, bf16[4,64]{1,0:T(8,128)(2,1)S(1)}, f32[2,3]{1,0}, f32[8]{0}, f32[8]{0}, /*index=5*/f32[8,2]{1,0}) while(%tuple.8), condition=%condition.5, body=%body.3, metadata={op_name="jit(train_step)/jvp()/while"}, backend_config={"flag_configs":[]}
  ROOT %fused_attention_forward.1 = (f32[16,256]{1,0}, bf16[2,64]{1,0:T(8,128)(2,1)S(1)}) custom-call(%x, /*index=1*/%while.48), custom_call_target="tpu_custom_call", operand_layout_constraints={bf16[4,64]{1,0}}, metadata={op_name="jit(train_step)/attend"}
}
"""


ONE_SLICE = Network()


def predict(text, kernel_cycles=lambda operation: 0.0, links=None, network=ONE_SLICE):
  """At a thousand cycles a second, over links of a thousand bytes a second between four in a row."""
  links = links or Links(1e3, ((0,), (1,), (2,), (3,)), (False,))
  return schedule.predict(
    hlo.parse(text), clock=1e3, links=links, kernel_cycles=kernel_cycles, network=network
  )  # fmt: skip


def work(name, cycles):
  config = f'backend_config={{"flag_configs":[],"estimated_cycles":"{cycles}"}}'
  return (
    f'%{name} = f32[2]{{0}} fusion(%x), kind=kLoop, {config}, metadata={{op_name="jit(f)/{name}"}}'
  )


# --- the text --------------------------------------------------------------------------------------


def test_parse_reads_what_tpus_programs_look_like():
  program = hlo.parse(SCAN.replace("START", "0"))
  assert program.entry == "main.7"
  assert set(program.computations) == {
    "region_1.1", "fused_computation.2", "body.3", "condition.5", "main.7",
  }  # fmt: skip
  x, _, _, packed, loop, kernel = program.computations["main.7"]
  assert (x.name, x.opcode, x.operands, x.bytes) == ("x", "parameter", (), 4 * 64 * 2)
  assert packed.operands == ("copy.3", "x", "x", "x", "x", "x")
  assert loop.opcode == "while" and loop.operands == ("tuple.8",)
  assert loop.called == {"condition": ["condition.5"], "body": ["body.3"]}
  assert loop.bytes == 4 + 512 + 24 + 32 + 32 + 64
  assert program.trips(loop) == 24
  assert kernel.target == "tpu_custom_call" and kernel.operands == ("x", "while.48")
  assert kernel.bytes == 16 * 256 * 4 + 2 * 64 * 2
  fusion = program.computations["body.3"][2]
  assert fusion.cycles == 1000 and fusion.called == {"calls": ["fused_computation.2"]}
  assert fusion.origin == "jit(train_step)/jvp()/while/body/closed_call/mul"
  assert schedule.origin(fusion) == "jvp()/mul"
  assert schedule.origin(kernel) == "fused_attention_forward"


def test_turns_taken_out_of_a_loop_are_not_counted_twice():
  program = hlo.parse(SCAN.replace("START", "1"))
  (loop,) = (o for o in program.computations["main.7"] if o.opcode == "while")
  assert program.trips(loop) == 23


def test_what_is_no_program_is_refused():
  with pytest.raises(ValueError, match="no entry computation"):
    hlo.parse("HloModule m\n\n%f (x: f32[]) -> f32[] {\n  ROOT %x = f32[] parameter(0)\n}\n")
  endless = SCAN.replace("START", "0").replace("constant(24)", "parameter(1)")
  program = hlo.parse(endless)
  (loop,) = (o for o in program.computations["main.7"] if o.opcode == "while")
  with pytest.raises(ValueError, match=r"while.48: no constant in its condition condition.5"):
    program.trips(loop)


@pytest.mark.parametrize(
  "shape, size",
  [
    ("bf16[3,4,64]{2,1,0:T(8,128)(2,1)S(1)}", 3 * 4 * 64 * 2),
    ("f32[]{:T(128)}", 4),
    ("(f32[2,3]{1,0}, (s32[2]{0:S(4)}, token[]), /*index=2*/u32[]{:S(2)}, pred[7]{0})", 43),
    ("s4[10]{0}", 5),
    ("f8e4m3fn[16]{0}", 16),
  ],
)
def test_sizes(shape, size):
  assert hlo.size_of(shape) == size


def test_dims():
  assert hlo.dims_of("(bf16[2,64]{1,0:T(8,128)}, f32[3])") == ("bfloat16", (2, 64))
  assert hlo.dims_of("f32[]") == ("float32", ())


@pytest.mark.parametrize(
  "printed, group",
  [
    ("replica_groups={{0,1,2,3},{4,5,6,7}}, use_global_device_ids=true", (0, 1, 2, 3)),
    ("replica_groups=[2,4]<=[8], dimensions={0}", (0, 1, 2, 3)),
    ("replica_groups=[4,2]<=[8]", (0, 1)),
    ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
    ("replica_groups=[2,4]<=[2,2,2]T(1,0,2), x", (0, 1, 4, 5)),
    ("replica_groups=mesh['axis_0'=4,'axis_1'=1] {'axis_0'}, dimensions={1}", (0, 1, 2, 3)),
    ("replica_groups=mesh['axis_0'=2,'axis_1'=2,'axis_2'=2] {'axis_0'}, x", (0, 4)),
    ("replica_groups=mesh['axis_0'=2,'axis_1'=2,'axis_2'=2] {'axis_0','axis_1'}", (0, 2, 4, 6)),
    ("replica_groups=mesh['a'=2,'b'=4] device_ids=([8]) {'b'}", (0, 1, 2, 3)),
    ("channel_id=1, source_target_pairs={{2,3},{3,2}}", (2, 3)),
    ("channel_id=1, to_apply=%add", (0, 1, 2, 3, 4, 5, 6, 7)),
  ],
)
def test_groups_of_devices_as_they_are_printed(printed, group):
  assert replica_group(f"channel_id=3, {printed}", 8) == group


# --- time ------------------------------------------------------------------------------------------


def test_a_loops_body_counts_as_often_as_it_turns():
  predicted = predict(SCAN.replace("START", "0"), lambda kernel: 500.0)
  assert predicted.compute == predicted.seconds == pytest.approx(24 * 1.0 + 0.5)
  assert predicted.kernels == 0.5 and predicted.exposed == 0
  assert predicted.by_origin == {"jvp()/mul": 24.0, "fused_attention_forward": 0.5}
  assert list(predicted.by_origin) == ["jvp()/mul", "fused_attention_forward"]


GATHER = "replica_groups={{0,1,2,3}}, dimensions={0}, use_global_device_ids=true"


def links_seconds(kind="all-gather", size=4000.0):
  return Links(1e3, ((0,), (1,), (2,), (3,)), (False,)).seconds(kind, size, (0, 1, 2, 3))


def test_a_collective_that_is_waited_for_is_exposed():
  text = entry(
    work("a", 100),
    f"%g = f32[1000]{{0}} all-gather(%x), channel_id=1, {GATHER}",
    f"%s = f32[250]{{0}} reduce-scatter(%g), channel_id=2, {GATHER}, to_apply=%add",
  )
  predicted = predict(text)
  assert predicted.exposed == pytest.approx(2 * links_seconds())
  assert predicted.seconds == pytest.approx(0.1 + 2 * links_seconds())
  for kind in ("all-gather", "reduce-scatter"):  # whole arrays, not parts
    found = predicted.collectives[kind]
    assert (found.count, found.bytes) == (1, 4000) and found.seconds == links_seconds()


@pytest.mark.parametrize("cycles", [0, 1000, 10_000])
def test_a_collective_begun_before_is_hidden_by_the_work_between(cycles):
  text = entry(
    f"%g = (f32[250]{{0}}, f32[1000]{{0}}) all-gather-start(%x), channel_id=1, {GATHER}",
    work("a", cycles),
    "%d = f32[1000]{0} all-gather-done(%g)",
  )
  predicted = predict(text)
  assert predicted.collectives["all-gather"].count == 1
  assert predicted.collectives["all-gather"].bytes == 4000
  assert predicted.exposed == pytest.approx(max(links_seconds() - cycles / 1e3, 0))
  assert predicted.seconds == pytest.approx(max(links_seconds(), cycles / 1e3))


def test_collectives_share_the_links():
  one, two = (
    f"%g{i} = (f32[250]{{0}}, f32[1000]{{0}}) all-gather-start(%x), channel_id={i}, {GATHER}"
    for i in (1, 2)
  )
  done = "%d2 = f32[1000]{0} all-gather-done(%g2)", "%d1 = f32[1000]{0} all-gather-done(%g1)"
  assert predict(entry(one, two, *done)).exposed == pytest.approx(2 * links_seconds())


def test_a_collective_that_fusions_begin_carry_and_end():
  """As v5e has it: the same channel in three fusions, with work of their own."""
  gather = f"all-gather(%p), channel_id=30, {GATHER}"
  before = f"""\
%begin (p: f32[250]) -> (f32[250], f32[1000]) {{
  %p = f32[250]{{0}} parameter(0)
  %all-gather.52 = f32[1000]{{0}} {gather}
  ROOT %custom-call.5 = (f32[250]{{0}}, f32[1000]{{0}}, u32[]{{:S(2)}}) custom-call(%all-gather.52), custom_call_target="AsyncCollectiveStart"
}}

%between (p: f32[250]) -> (f32[2], f32[250]) {{
  %p = f32[250]{{0}} parameter(0)
  %all-gather.54 = f32[1000]{{0}} {gather}
  ROOT %t = (f32[2]{{0}}, f32[1000]{{0}}) tuple(%p, %all-gather.54)
}}

%end (p: f32[250]) -> f32[1000] {{
  %p = f32[250]{{0}} parameter(0)
  %all-gather.58 = f32[1000]{{0}} {gather}
  ROOT %custom-call.7 = f32[1000]{{0}} custom-call(%p, %all-gather.58), custom_call_target="AsyncCollectiveDone"
}}
"""
  text = entry(
    "%s = (f32[250]{0}, f32[1000]{0}) fusion(%x), kind=kCustom, calls=%begin",
    '%w = (f32[2]{0}, f32[250]{0}) fusion(%s), kind=kLoop, calls=%between, backend_config={"estimated_cycles":"1000"}',
    "%d = f32[1000]{0} fusion(%s, %w), kind=kCustom, calls=%end",
    before=before,
  )
  predicted = predict(text)
  assert collectives.count(hlo.parse(text)) == {"all-gather": 1}
  assert predicted.compute == 1.0
  assert predicted.exposed == pytest.approx(links_seconds() - 1.0)


def test_a_sum_that_is_scattered_within_a_fusion():
  before = f"""\
%all-reduce-scatter (input: f32[1000]) -> f32[250] {{
  %input = f32[1000]{{0}} parameter(0)
  %all-reduce.18 = f32[1000]{{0}} all-reduce(%input), channel_id=19, {GATHER}, to_apply=%add
  %id = u32[] partition-id()
  ROOT %dynamic-slice.32 = f32[250]{{0}} dynamic-slice(%all-reduce.18, %id), dynamic_slice_sizes={{250}}
}}
"""
  call = "%f = f32[250]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter"
  predicted = predict(entry(call, before=before))
  assert predicted.collectives.keys() == {"reduce-scatter"}
  assert predicted.collectives["reduce-scatter"].bytes == 4000
  assert predicted.exposed == pytest.approx(links_seconds())


def test_a_collective_on_a_sparse_core():
  """As tpu7x has it: what is called is the collective, its end is awaited later."""
  before = f"""\
%called_computation.17 (param: f32[1000], token: token[]) -> f32[250] {{
  %token = token[] parameter(1)
  %param = f32[1000]{{0}} parameter(0)
  ROOT %reduce-scatter.20 = f32[250]{{0}} reduce-scatter(%param), channel_id=1, {GATHER}, to_apply=%add
}}, execution_thread="sparsecore"
"""
  text = entry(
    '%s.call-start = ((f32[1000]{0}, token[]), f32[250]{0}) call-start(%x, %t), async_execution_thread="sparsecore", to_apply=%called_computation.17',
    work("a", 1000),
    "%s.call-done = f32[250]{0} call-done(%s.call-start)",
    before=before,
  )
  predicted = predict(text)
  assert predicted.collectives["reduce-scatter"].count == 1
  assert predicted.collectives["reduce-scatter"].bytes == 4000
  assert predicted.exposed == pytest.approx(links_seconds() - 1.0)


def test_collectives_in_a_loop_count_each_turn():
  text = SCAN.replace("START", "0").replace(
    "  %fusion.9 =",
    f"  %g = f32[1000]{{0}} all-gather(%gte.1), channel_id=1, {GATHER}\n  %fusion.9 =",
  )
  assert collectives.count(hlo.parse(text)) == {"all-gather": 24}
  predicted = predict(text)
  assert predicted.exposed == pytest.approx(24 * links_seconds())
  assert predicted.collectives["all-gather"].bytes == 24 * 4000


CROSSING = (
  "channel_id={}, is_host_transfer=true, frontend_attributes={{_xla_host_transfer_handler_name="
  '"xla_megascale_runtime",_xla_host_transfer_rendezvous="psum.{}_0",_xla_megascale_target="{{1,2}}x{{0:3}}",'
  '_xla_megascale_transfer_type="{}"}}'
)


def crossing(name, kind="ALL_REDUCE"):
  """Lines of a sum over slices of 4,000 bytes a device: its begin, and its end."""
  array = "(f32[1000]{0}, u32[], token[])"
  return (
    f"%send.{name} = {array} send(%x, %after-all), {CROSSING.format(2, name, kind)}",
    f"%recv.{name} = {array} recv(%after-all), {CROSSING.format(1, name, kind)}",
  ), (
    f"%send-done.{name} = token[] send-done(%send.{name}), channel_id=2, is_host_transfer=true",
    f"%recv-done.{name} = (f32[1000]{{0}}, token[]) recv-done(%recv.{name}), channel_id=1",
  )


@pytest.mark.parametrize("cycles", [0, 1000, 10_000])
def test_a_sum_over_slices_is_hidden_by_the_work_between(cycles):
  begin, end = crossing("7")
  text = entry(*begin, work("a", cycles), *end)
  predicted = predict(text, network=Network(2, 2000.0))
  # Of two slices each device sends what it holds once: half for a sum, half of the sum back.
  assert predicted.network.count == 1 and predicted.network.bytes == 4000
  assert predicted.network.seconds == 2.0
  exposed = max(2.0 - cycles / 1e3, 0)
  assert predicted.network.exposed == predicted.exposed == pytest.approx(exposed)
  assert predicted.seconds == pytest.approx(max(2.0, cycles / 1e3))
  assert not predicted.collectives  # nothing on the links


def test_sums_over_slices_share_the_network_and_a_receipt_may_come_first():
  (one, two), (three, four) = crossing("1"), crossing("2")
  text = entry(one[1], one[0], *three, *two, *four)
  predicted = predict(text, network=Network(2, 2000.0))
  assert predicted.network.count == 2 and predicted.network.exposed == pytest.approx(4.0)


def test_sums_over_slices_in_a_loop_count_each_turn():
  begin, end = crossing("1")
  lines = "\n".join(f"  {line}" for line in (*begin, *end)).replace("%x", "%gte.1")
  text = SCAN.replace("START", "0").replace("  %fusion.9 =", f"{lines}\n  %fusion.9 =")
  predicted = predict(text, network=Network(2, 2000.0))
  assert predicted.network.count == 24 and predicted.network.bytes == 24 * 4000
  assert predicted.network.exposed == predicted.exposed == pytest.approx(48.0)


@pytest.mark.parametrize(
  "kind, sent",
  [
    ("all-reduce", 6000), ("reduce-scatter", 3000), ("all-to-all", 3000), ("all-gather", 12_000),
    ("collective-permute", 4000),
  ],
)  # fmt: skip
def test_what_a_device_of_four_slices_sends(kind, sent):
  assert Network(4, 1.0).sent(kind, 4000) == sent


def test_copies_to_the_hosts_memory_are_awaited():
  size = 16e9 / 4  # bytes that take a quarter of a second
  start = (
    "%s = ((bf16[48,BIG]{1,0:T(8,128)(2,1)S(5)}, bf16[1,BIG]{1,0:T(8,128)(2,1)}, s32[]), "
    "bf16[48,BIG]{1,0:T(8,128)(2,1)S(5)}, u32[]{:S(2)}) dynamic-update-slice-start(%x, %y, %i)"
  ).replace("BIG", str(int(size / 2)))
  done = "%d = bf16[48,9]{1,0:S(5)} dynamic-update-slice-done(%s)"
  assert predict(entry(start, done)).exposed == pytest.approx(0.25)
  assert predict(entry(start, work("a", 100), done)).exposed == pytest.approx(0.15)
  assert predict(entry(start, work("a", 300), done)).exposed == 0
  # Between HBM and VMEM (memory space 1) is a prefetch, which is taken to be hidden.
  assert predict(entry(start.replace("S(5)", "S(1)"), done.replace("S(5)", "S(1)"))).seconds == 0


def test_links():
  latency = schedule._LATENCY
  line = Links(100.0, tuple((i,) for i in range(4)), (False,))
  ring = Links(100.0, tuple((i,) for i in range(4)), (True,))
  everyone = (0, 1, 2, 3)
  assert line.seconds("all-gather", 400, everyone) == pytest.approx(3 + 3 * latency)
  assert ring.seconds("all-gather", 400, everyone) == pytest.approx(1.5 + 3 * latency)
  assert ring.seconds("all-gather", 400, (0, 1)) == pytest.approx(2 + latency)  # not around
  for links in (line, ring):
    gathered = links.seconds("all-gather", 400, everyone)
    assert links.seconds("reduce-scatter", 400, everyone) == gathered
    assert links.seconds("all-reduce", 400, everyone) == pytest.approx(2 * gathered)
    assert links.seconds("collective-permute", 400, (0, 1)) == pytest.approx(4 + latency)
    assert links.seconds("all-gather", 400, (2,)) == links.seconds("all-gather", 0, everyone) == 0
  square = Links(100.0, tuple((i, j) for i in range(4) for j in range(4)), (False, False))
  torus = dataclasses.replace(square, wrapped=(True, True))
  row, all_of_them = (0, 1, 2, 3), tuple(range(16))
  assert square.seconds("all-gather", 400, row) == line.seconds("all-gather", 400, everyone)
  assert square.seconds("all-gather", 1600, all_of_them) == pytest.approx(7.5 + 6 * latency)
  assert torus.seconds("all-gather", 1600, all_of_them) == pytest.approx(3.75 + 6 * latency)


# --- memory ----------------------------------------------------------------------------------------

HBM = round(15.75 * 2**30)
EARLY = (
  "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
  "(313.64G) exceeds available HBM (15.75G)."
)
LATE = """\
RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 18.02G of 15.75G hbm. Exceeded hbm capacity by 2.27G.

Total hbm usage >= 18.27G:
    reserved        258.00M
    program          18.02G
    arguments            0B

Output size 0B; shares 0B with arguments.

Program hbm requirement 18.02G:
    global           276.0K
    HLO temp         18.02G (100.0% utilization: Unpadded (17.97G) Padded (17.97G), 0.3% fragmentation (50.19M))

  Largest program allocations in hbm:

  1. Size: 9.00G
     Operator: op_name="jit(train_step)/jvp()/while/body/closed_call/mul" source_file="image_gpt.py" source_line=1
     Shape: bf16[48,64,1024,1536]{3,2,1,0:T(8,128)(2,1)}
     Unpadded size: 9.00G
     XLA label: fusion.12 = fusion(...)
     Allocation type: HLO temp
     ==========================

  2. Size: 768.00M
     Shape: f32[128,1024,1536]{2,1,0:T(8,128)}
     Unpadded size: 768.00M
     Allocation type: HLO temp
     ==========================
"""


def test_what_the_compiler_says_when_memory_is_too_small():
  early = forecast._refused(EARLY, HBM)
  assert early.needed == round(313.64 * 2**30) and early.hbm == HBM and not early.fits
  assert early.largest == []
  late = forecast._refused(LATE, HBM)
  assert late.needed == round(18.02 * 2**30) and not late.fits
  assert late.largest == [
    (9 * 2**30, "bf16[48,64,1024,1536]", "jit(train_step)/jvp()/while/body/closed_call/mul"),
    (768 * 2**20, "f32[128,1024,1536]", ""),
  ]
  assert forecast._refused("INTERNAL: Mosaic failed to compile TPU kernel", HBM) is None


def test_largest_arrays_are_in_hbm_and_told_once():
  text = SCAN.replace("START", "0").replace(
    "  %fusion.9 =",
    "  %vmem = f32[1000]{0:T(1024)S(1)} add(%gte.1, %gte.1)\n"
    '  %big = f32[100]{0:T(1024)} add(%gte.1, %gte.1), metadata={op_name="jit(train_step)/while/body/add"}\n'
    '  %again = f32[100]{0:T(1024)} add(%gte.1, %gte.1), metadata={op_name="jit(train_step)/while/body/add"}\n'
    "  %fusion.9 =",
  )
  found = forecast.largest_arrays(hlo.parse(text))
  assert found[:2] == [(1024, "f32[4,64]", "jvp()/mul"), (400, "f32[100]", "add")]
  assert [shape for _, shape, _ in found].count("f32[100]") == 1
  assert "f32[1000]" not in [shape for _, shape, _ in found]
  assert len(forecast.largest_arrays(hlo.parse(text), n=1)) == 1


# --- slices and plans ------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "name, message",
  [
    ("v5x:4x4", r"'v5x:4x4'; expected one of v4, v5e, v5p, v6e, tpu7x .*did you mean v5[ep]:4x4"),
    ("v5e", r"'v5e'; v5e has no slice ''"),
    (
      "v5e:4x5",
      r"no slice '4x5'; expected one that it has; nearest: v5e:2x4, v5e:4x4, v5e:4x8; all: 1x1, 2x2, 2x4",
    ),
    (
      "v5p:4x4",
      r"no slice '4x4'; expected one that it has; nearest: v5p:2x2x2, v5p:2x2x4, v5p:2x4x4",
    ),
    ("v6e:four", r"no slice 'four'; expected one that it has; nearest: v6e:2x4, v6e:4x4, v6e:4x8"),
    ("h100", r"'h100'; expected one of v4"),
    ("", r"''; expected one of v4"),
  ],
)
def test_a_slice_that_there_is_not(name, message):
  with pytest.raises(UserError, match=message):
    topology.check_name(name)


def test_slices_that_there_are():
  for kind in topology.GENERATIONS:
    for shape in tpu_types.KINDS[kind].shapes:
      topology.check_name(f"{kind}:{shape}")


@dataclasses.dataclass(frozen=True)
class FakeSlice:
  """Eight chips in a row, with as much memory as said."""

  hbm_gib: float
  name: str = "v5e:2x4"
  slices: int = 1

  @property
  def devices(self):
    tiny.mesh_of((8, 1, 1))
    return tuple(jax.devices()[:8])

  @property
  def chip(self):
    return hardware.Chip("v5e", 197e12, self.hbm_gib * 2**30, 819e9)

  @property
  def title(self):
    return self.name

  def links(self, devices):
    return Links(45e9, tuple((i,) for i in range(8)), (False,))


def make_training(remat="names", batch_size=64, accumulate=1, **changes):
  model = dict(n_layer=24, n_head=8, n_embd=512, n_vocab=512, n_positions=1024, dtype="bfloat16")
  return forecast.Training(
    tiny.make_config(**{**model, "remat": remat, **changes}),
    make_objective("autoregressive", 0.15),
    OptimizerConfig(learning_rate=1e-3, steps=100),
    batch_size,
    accumulate,
  )


def test_candidates_divide_evenly_and_fit():
  training, chips = make_training(), FakeSlice(16)
  found = list(plan.candidates(training, chips))
  settings = [
    (*c.mesh.shape.values(), c.training.batch_size, c.training.model.remat) for c in found
  ]
  assert len(settings) == len(set(settings)) > 20
  for candidate in found:
    assert candidate.mesh.size == 8
    assert 64 <= candidate.training.batch_size <= plan.LARGEST_BATCH * 64
    assert plan.memory(candidate.training, candidate.mesh) < 16 * 2**30
    sharding.batch_size_per_shard(candidate.mesh, candidate.training.batch_size)
    sharding.check_model_fits(candidate.mesh, n_head=8, n_embd=512)
  assert {c.training.model.remat for c in found} == {"none", "names", "full"}
  smaller = list(plan.candidates(training, FakeSlice(2)))
  assert 0 < len(smaller) < len(found)
  assert list(plan.candidates(training, FakeSlice(0.01))) == []
  # Six heads don't divide over four, 768 rows divide over eight.
  odd = list(plan.candidates(make_training(n_head=6, n_embd=768), chips))
  assert {c.mesh.shape["tensor"] for c in odd} == {1, 2}


def test_memory_by_arithmetic():
  whole, split = (tiny.mesh_of(shape) for shape in ((8, 1, 1), (1, 8, 1)))
  parameters = 25_952_256 * 3  # of iGPT-S: 24 layers of 12 · 512², tables, gains, nearly
  state = arrangement.state_bytes(make_training().model, 1)
  assert state / parameters == pytest.approx(arrangement._STATE, rel=0.02)
  assert plan.memory(make_training(), split) == pytest.approx(
    plan.memory(make_training(), whole) - state * 7 / 8
  )
  held = {r: plan.memory(make_training(remat=r), whole) for r in ("none", "names", "full")}
  assert held["none"] > held["names"] > held["full"] > state
  parts = plan.memory(make_training(accumulate=2), whole)
  assert parts - state == pytest.approx((held["names"] - state) / 2)
  assert plan.memory(make_training(batch_size=128, accumulate=2), whole) == held["names"]
  offered = plan.memory(make_training(remat="offload"), whole)
  assert state < offered <= held["full"]


def test_what_would_make_a_step_fit():
  whole, split = (tiny.mesh_of(shape) for shape in ((8, 1, 1), (1, 8, 1)))
  first = plan.remedies(make_training(remat="none"), whole)
  assert first[0] == "--config.model.remat=names"
  assert first[1].startswith(
    "--config.mesh.data=1 --config.mesh.fsdp=-1 (the state takes about 1.3"
  )
  assert first[2] == "--config.train.accumulate=2"
  assert plan.remedies(make_training(remat="names", accumulate=2), split)[:2] == [
    "--config.model.remat=full", "--config.train.accumulate=4",
  ]  # fmt: skip
  last = plan.remedies(make_training(remat="full", batch_size=8), split)
  assert last == ["a larger slice", "--config.compile.plan=True, which looks for what fits"]
  # What doesn't divide isn't proposed.
  assert not any("fsdp" in r for r in plan.remedies(make_training(n_head=3, n_embd=300), whole))


# --- the training step's collectives ---------------------------------------------------------------

RECIPE = OptimizerConfig(learning_rate=0.01, steps=10)


@functools.cache
def compiled(shape, n_layer, causal=True, accumulate=1):
  """The real step, by XLA for CPUs, whose partitioner is the one that TPUs' programs go through."""
  config = tiny.make_config(n_layer=n_layer, n_head=4, n_embd=32, causal=causal)
  objective = make_objective("autoregressive" if causal else "masked", 0.4)
  optimizer = make_optimizer(RECIPE)
  mesh = tiny.mesh_of(shape)
  train_step = make_train_step(config, objective, optimizer, make_schedule(RECIPE), accumulate)
  tokens = jax.ShapeDtypeStruct(
    (16, config.n_positions), jnp.uint16, sharding=sharding.sharding(mesh, "batch")
  )
  with jax.set_mesh(mesh):
    step = compilation.compile_step(
      train_step,
      abstract_state(config, optimizer),
      state_shardings(config, optimizer, mesh),
      {"tokens": tokens},
      tiny._compiler_options(),
    )
  return hlo.parse(step.executable.as_text())


def written(program):
  """Collectives by kind, as often as they stand in the program, however often they run."""
  kinds = [
    operation.opcode.removesuffix("-start")
    for operations in program.computations.values()
    for operation in operations
  ]
  return {kind: kinds.count(kind) for kind in schedule.COLLECTIVES if kind in kinds}


def loops(program):
  return sum(
    o.opcode == "while" for operations in program.computations.values() for o in operations
  )


@pytest.mark.parametrize(
  ("shape", "causal"), [*((shape, True) for shape in tiny.MESHES), ((2, 2, 2), False)], ids=str
)
def test_collectives_are_the_intended_ones(shape, causal):
  """Each layer's four matrices are gathered in both scans, their gradients scattered as they are
  summed; activations never move but to be summed over tensor."""
  n_layer = 3
  program = compiled(shape, n_layer, causal)
  run, stand = collectives.count(program), written(program)
  assert "all-to-all" not in stand and "collective-permute" not in stand
  assert set(stand) <= {"all-gather", "all-reduce", "reduce-scatter"}
  if shape[1] == 1:
    assert set(stand) == {"all-reduce"}  # of the gradients alone: layer by layer, and the rest
    assert run["all-reduce"] <= n_layer + 2
    return
  tables = 4  # tokens', positions' and output's, the last one again in the backward pass
  assert stand["all-gather"] == 8 + tables
  assert run["all-gather"] == 8 * n_layer + tables
  assert stand["reduce-scatter"] == 4 + 1
  assert run["reduce-scatter"] == 4 * n_layer + 1


def test_depth_changes_how_often_collectives_run_not_how_many_there_are():
  shallow, deep = (compiled((2, 2, 2), n_layer) for n_layer in (3, 6))
  assert written(shallow) == written(deep)
  assert loops(shallow) == loops(deep) > 0
  assert collectives.count(deep)["all-gather"] == 8 * 6 + 4


def test_accumulation_gathers_anew_for_each_part_and_resharding_none():
  program = compiled((1, 2, 4), 2, True, 2)
  run = collectives.count(program)
  assert run["all-gather"] == 2 * (8 * 2 + 2) and run["reduce-scatter"] == 2 * (4 * 2 + 1)
  assert "all-to-all" not in run and "collective-permute" not in run
