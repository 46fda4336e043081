"""Bytes and collectives of a program, counted by hand from its text."""

import pytest

from rndpo_jax.planning import hlo

TEXT = """\
HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[]{:T(128)} parameter(0)
  %y = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%x, %y)
}

%body (p: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %p = (s32[]{:T(128)S(6)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %value = f32[8,128]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %index = s32[]{:T(128)S(6)} get-tuple-element(%p), index=0
  %twice = f32[8,128]{1,0:T(8,128)} fusion(%value), kind=kLoop, calls=%fused, \
backend_config={"estimated_cycles":"70"}
  ROOT %next = (s32[]{:T(128)S(6)}, f32[8,128]{1,0:T(8,128)}) tuple(%index, %twice)
}

%fused (q: f32[8,128]) -> f32[8,128] {
  %q = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %out = f32[8,128]{1,0:T(8,128)} add(%q, %q)
}

ENTRY %main (a: f32[8,128], m: u8[64,128]) -> f32[8,128] {
  %a = f32[8,128]{1,0:T(8,128)} parameter(0)
  %m = u8[64,128]{1,0:T(32,128)(4,1)} parameter(1)
  %prefetch = (u8[64,128]{1,0:T(32,128)(4,1)S(1)}, u8[64,128]{1,0:T(32,128)(4,1)}, u32[]{:S(2)}) \
copy-start(%m)
  %near = u8[64,128]{1,0:T(32,128)(4,1)S(1)} copy-done(%prefetch)
  %slices = ((u8[64,128]{1,0:T(32,128)(4,1)}), u8[32,128]{1,0:T(32,128)(4,1)S(1)}, s32[]{:S(2)}) \
slice-start(%m), slice={[0:32], [0:128]}
  %use = (f32[8,128]{1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)S(1)}) fusion(%a, %near), kind=kLoop, \
backend_config={"estimated_cycles":"1000"}
  %first = f32[8,128]{1,0:T(8,128)} get-tuple-element(%use), index=0
  %reduced = f32[8,128]{1,0:T(8,128)} all-reduce(%first), replica_groups={}, to_apply=%add
  %start = (s32[]{:T(128)S(6)}, f32[8,128]{1,0:T(8,128)}) tuple(%zero, %reduced)
  %loop = (s32[]{:T(128)S(6)}, f32[8,128]{1,0:T(8,128)}) while(%start), condition=%cond, \
body=%body, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %result = f32[8,128]{1,0:T(8,128)} get-tuple-element(%loop), index=1
}
"""

PLANE = 8 * 128 * 4
MASK = 64 * 128


def test_hbm_bytes():
  prefetched = MASK + MASK / 2  # read once each; what arrives lies in vector memory
  fusion = 2 * PLANE  # %a and %first; %near and the second result are in vector memory
  all_reduce = 2 * PLANE
  loop = 5 * 2 * PLANE
  assert hlo.hbm_bytes(TEXT) == prefetched + fusion + all_reduce + loop


GPU_TEXT = """\
HloModule jit_loss, is_scheduled=true

%fused_select (p: f32[8,128]) -> f32[8] {
  %p = f32[8,128]{1,0} parameter(0)
  ROOT %sum = f32[8]{0} reduce(%p), dimensions={1}, to_apply=%add
}

%command_buffer (p.1: f32[8,128]) -> (f32[8], f32[8,128]) {
  %p.1 = f32[8,128]{1,0} parameter(0)
  %reduce_fusion = f32[8]{0} fusion(%p.1), kind=kInput, calls=%fused_select
  %loop_fusion = f32[8,128]{1,0} fusion(%p.1, %reduce_fusion), kind=kLoop, calls=%fused_select
  ROOT %tuple = (f32[8]{0}, f32[8,128]{1,0}) tuple(%reduce_fusion, %loop_fusion)
}

ENTRY %main (a: f32[8,128]) -> (f32[8], f32[8,128]) {
  %a = f32[8,128]{1,0} parameter(0)
  %cast = f32[8,128]{1,0} bitcast(%a)
  %gemm = f32[8,128]{1,0} custom-call(%cast), custom_call_target="__cublas$gemm"
  %call = (f32[8]{0}, f32[8,128]{1,0}) call(%gemm), to_apply=%command_buffer
  %first = f32[8]{0} get-tuple-element(%call), index=0
  %start = ((f32[8]{0}), f32[8]{0}, u32[]) copy-start(%first)
  %done = f32[8]{0} copy-done(%start)
  %second = f32[8,128]{1,0} get-tuple-element(%call), index=1
  ROOT %out = (f32[8]{0}, f32[8,128]{1,0}) tuple(%done, %second)
}
"""


def test_kernels():
  # A library call, two fusions of the command buffer, and a copy; no bitcast, tuple or "done".
  assert hlo.kernels(GPU_TEXT) == 4
  assert hlo.kernels(TEXT) == 2 + 1 + 1 + 5  # prefetches, fusion, all-reduce, a loop of 5


def test_cycles():
  assert hlo.cycles(TEXT) == 1000 + 5 * 70


def test_a_loop_that_runs_an_unknown_number_of_times_counts_once():
  unknown = TEXT.replace('"known_trip_count":{"n":"5"}', "")
  difference = hlo.hbm_bytes(TEXT) - hlo.hbm_bytes(unknown)
  assert difference == 4 * 2 * PLANE


def test_the_trips_of_a_scan_on_tpu_stand_in_its_condition():
  """As libtpu 0.0.42 writes it; a loop that compares something else counts once."""
  condition = """%cond (c: (s32[], f32[8,128])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5)
  %c = (s32[]{:T(128)S(6)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %count = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %lt = pred[]{:T(512)} compare(%count, %limit), direction=LT, metadata={}
}

"""
  silent = TEXT.replace('"known_trip_count":{"n":"5"}', "")
  by_condition = silent.replace("%fused (q", condition + "%fused (q")
  assert hlo.hbm_bytes(by_condition) == hlo.hbm_bytes(TEXT)
  assert hlo.cycles(by_condition) == hlo.cycles(TEXT)
  sums = by_condition.replace("get-tuple-element(%c), index=0", "reduce(%c), dimensions={0}")
  assert hlo.hbm_bytes(sums) == hlo.hbm_bytes(silent)


def test_collectives_in_a_loop_count_as_often_as_it_runs():
  inside = TEXT.replace("fusion(%value), kind=kLoop, calls=%fused", "all-reduce(%value)")
  assert hlo.collectives(inside) == [("all-reduce", PLANE)] * 6


def test_what_a_start_passes_on_is_not_moved_twice():
  plane = "f32[8,128]{1,0:T(8,128)}"
  text = TEXT.replace(
    f"%reduced = {plane} all-reduce(%first)",
    f"%reduced = ({plane}, {plane}, u32[]{{:S(2)}}, u32[]{{:S(2)}}) "
    "collective-permute-start(%first)",
  )
  assert text != TEXT and hlo.collectives(text) == [("collective-permute", PLANE)]
  assert hlo.hbm_bytes(text) == hlo.hbm_bytes(TEXT)


def test_loops_in_loops_count_as_often_as_both_run():
  loop = TEXT[TEXT.index("  %loop = ") : TEXT.index("  ROOT %result")]
  outer = f"""%outer (o: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {{
  %start = (s32[]{{:T(128)S(6)}}, f32[8,128]{{1,0:T(8,128)}}) parameter(0)
{loop}}}

ENTRY"""
  thrice = loop.replace("body=%body", "body=%outer").replace('"n":"5"', '"n":"3"')
  text = TEXT.replace(loop, thrice).replace("ENTRY", outer)
  assert hlo.cycles(text) == 1000 + 3 * 5 * 70
  assert hlo.hbm_bytes(text) - hlo.hbm_bytes(TEXT) == (3 - 1) * 5 * 2 * PLANE
  text = text.replace("fusion(%value), kind=kLoop, calls=%fused", "all-reduce(%value)")
  assert hlo.collectives(text) == [("all-reduce", PLANE)] * (1 + 3 * 5)


# One plane read and written, and two read and one written.
BRANCHES = """\
%less (l: f32[8,128]) -> f32[8,128] {
  %l = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %one = f32[8,128]{1,0:T(8,128)} negate(%l), backend_config={"estimated_cycles":"30"}
}

%more (k: f32[8,128]) -> f32[8,128] {
  %k = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %two = f32[8,128]{1,0:T(8,128)} add(%k, %k), backend_config={"estimated_cycles":"50"}
}

ENTRY"""


@pytest.mark.parametrize(
  "opcode,branches",
  [
    ("conditional(%pick, %a, %a)", "branch_computations={%more, %less}"),
    ("conditional(%pick, %a, %a)", "branch_computations={%less, %more}"),
    ("conditional(%pick, %a, %a)", "true_computation=%more, false_computation=%less"),
    ("call(%a)", "to_apply=%more"),
  ],
)
def test_branches_and_calls_cost_what_they_hold(opcode, branches):
  """The costliest branch alone, whatever the branch's or call's own line says."""
  line = f'  %c = f32[8,128]{{1,0:T(8,128)}} {opcode}, {branches}, x={{"estimated_cycles":"9"}}\n'
  text = TEXT.replace("ENTRY", BRANCHES).replace("  %loop = ", line + "  %loop = ")
  assert hlo.cycles(text) - hlo.cycles(TEXT) == 50
  assert hlo.hbm_bytes(text) - hlo.hbm_bytes(TEXT) == 3 * PLANE


# Fusions in a fusion, as libtpu 0.0.42 puts the slicing of what a loop goes through.
SLICES = """\
%inner (s: f32[4,8,128], t: s32[]) -> f32[8,128] {
  %s = f32[4,8,128]{2,1,0:T(8,128)} parameter(0)
  %t = s32[]{:T(128)S(6)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %slice = f32[1,8,128]{2,1,0:T(8,128)} dynamic-slice(%s, %t, %zero, %zero), \
dynamic_slice_sizes={1,8,128}
  ROOT %flat = f32[8,128]{1,0:T(8,128)} bitcast(%slice)
}

%outer (u: s32[], v: f32[4,8,128]) -> f32[8,128] {
  %v = f32[4,8,128]{2,1,0:T(8,128)} parameter(1)
  %u = s32[]{:T(128)S(6)} parameter(0)
  %part = f32[8,128]{1,0:T(8,128)} fusion(%v, %u), kind=kLoop, calls=%inner
  %other = f32[8,128]{1,0:T(8,128)} negate(%part)
  ROOT %both = f32[8,128]{1,0:T(8,128)} add(%part, %other)
}

ENTRY"""
_STACKED = """\
  %at = s32[]{:T(128)S(6)} custom-call()
  %stack = f32[4,8,128]{2,1,0:T(8,128)} get-tuple-element(%start), index=1
  %c = f32[8,128]{1,0:T(8,128)S(1)} fusion(%at, %stack), kind=kLoop, calls=%outer
"""


@pytest.mark.parametrize(
  "old,new,planes",
  [
    ("", "", 1),
    ("dynamic-slice(", "gather(", 4),
    ("negate(%part)", "negate(%u)", 1),
    ("fusion(%v, %u)", "fusion(%u, %v)", 4),  # the stack as the index
    ("negate(%part)", "reduce(%v, %u)", 4),  # a slice, and all of it
    ("negate(%part)", "fusion(%v, %u), kind=kLoop, calls=%inner", 2),
    ("fusion(%at, %stack), kind=kLoop, calls=%outer", "dynamic-slice(%stack, %at, %at, %at)", 1),
    ("fusion(%at, %stack), kind=kLoop, calls=%outer", "dynamic-slice(%a, %at, %stack, %at)", 5),
  ],
)
def test_only_the_slices_of_a_sliced_array_are_read(old, new, planes):
  text = TEXT.replace("ENTRY", SLICES).replace("  %loop = ", _STACKED + "  %loop = ")
  text = text.replace(old, new)
  assert hlo.hbm_bytes(text) - hlo.hbm_bytes(TEXT) == planes * PLANE


def test_joining_adjacent_arrays_costs_nothing():
  """As libtpu 0.0.42 writes a concatenation whose parts were written where they shall stand."""
  array = "f32[16,128]{1,0:T(8,128)}"
  for target, moved in (("ConcatBitcast", 0), ("Other", 4 * PLANE)):
    line = f'  %c = {array} custom-call(%a, %first), custom_call_target="{target}"\n'
    text = TEXT.replace("  %loop = ", line + "  %loop = ")
    assert hlo.hbm_bytes(text) - hlo.hbm_bytes(TEXT) == moved


def test_collectives_are_found_with_their_bytes():
  assert hlo.collectives(TEXT) == [("all-reduce", PLANE)]


@pytest.mark.parametrize(
  "start,kind",
  [("all-reduce-start(", "all-reduce"), ("all-gather(", "all-gather"), ("send(", "send")],
)
def test_other_collectives(start, kind):
  found = hlo.collectives(TEXT.replace("all-reduce(", start))
  assert [name for name, _ in found] == [kind]


def test_largest_instructions_of_the_program_itself():
  assert hlo.largest(TEXT, MASK) == [
    ("copy-start prefetch", MASK),
    ("fusion use", 2 * PLANE),
    ("all-reduce reduced", 2 * PLANE),
    ("while loop", 5 * 2 * PLANE),
  ]


@pytest.mark.parametrize(
  "kind,expected",
  [
    ("f32[16,256,256,4]{2,1,3,0:T(8,128)}", 16 * 256 * 256 * 4 * 4),
    ("f32[16,256,256,4]{3,2,1,0:T(8,128)}", 16 * 256 * 256 * 128 * 4),
    ("u8[3,5,130]{1,2,0:T(32,128)(4,1)}", 3 * 128 * 160),
    ("f32[]{:T(128)}", 4),
    ("bf16[3,5]{1,0}", 3 * 5 * 2),
  ],
)
def test_arrays_are_counted_with_the_padding_of_their_tiles(kind, expected):
  text = f"""ENTRY %main (z: f32[]) -> f32[] {{
  ROOT %made = {kind} fusion(), kind=kLoop, calls=%fused
}}"""
  assert hlo.hbm_bytes(text) == expected
