"""The cost of a compiled program, of a text written by hand."""

from phi4mm_jax.testing.compiled import CHIPS, cost

PROGRAM = """
%inner (a: bf16[64,32]) -> bf16[64,16] {
  %a = bf16[64,32]{1,0} parameter(0)
  %b = bf16[32,16]{1,0} constant(0)
  ROOT %convolution.1 = bf16[64,16]{1,0} convolution(%a, %b), dim_labels=bf_io->bf
}

%batched (a: bf16[4,16,8,64], b: bf16[4,16,64,8]) -> f32[4,16,8,8] {
  %a = bf16[4,16,8,64]{3,2,1,0} parameter(0)
  %b = bf16[4,16,64,8]{3,2,1,0} parameter(1)
  ROOT %convolution.2 = f32[4,16,8,8]{3,2,1,0} convolution(%a, %b), window={size=4x16 stride=3x15 lhs_dilate=4x16}, dim_labels=01bf_01io->01bf
}

%outer (a: bf16[64,1,32], b: bf16[24,64,128]) -> bf16[32,24,128] {
  %a = bf16[64,1,32]{2,1,0} parameter(0)
  %b = bf16[24,64,128]{2,1,0} parameter(1)
  %within = bf16[64,16]{1,0} fusion(%a), kind=kOutput, calls=%inner
  ROOT %convolution.3 = bf16[32,24,128]{2,1,0} convolution(%a, %b), window={size=24 pad=23_23 rhs_reversal=1}, dim_labels=f0b_0io->b0f
}

%body (state: (s32[], f32[8])) -> (s32[], f32[8]) {
  %state = (s32[], f32[8]) parameter(0)
  %fusion.1 = bf16[32,24,128]{2,1,0} fusion(%x, %y), kind=kOutput, calls=%outer, backend_config={"estimated_cycles":"70"}
  %sum = bf16[32,24,128]{2,1,0} all-reduce(%fusion.1), to_apply=%add, metadata={op_name="jit(step)/layers/out"}
  %exp = f32[8]{0} exponential(%z), metadata={op_name="jit(step)/layers/norm"}, backend_config={"estimated_cycles":"5"}
}

%until (state: (s32[], f32[8])) -> pred[] {
  %limit = s32[] constant(3)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %loop = (s32[], f32[8]) while(%start), condition=%until, body=%body
  ROOT %fusion.2 = f32[4,16,8,8]{3,2,1,0} fusion(%q, %k), kind=kOutput, calls=%batched, backend_config={"estimated_cycles":"11"}
}
"""  # noqa: E501


def test_work_of_products_and_all_else_is_told_apart():
    """The loop runs three times; of padding and of gaps nothing is multiplied, and a fusion within one counts."""
    found = cost(PROGRAM, CHIPS["v5e"])
    outer, within, batched = 32 * 64 * 24 * 128, 64 * 32 * 16, 4 * 16 * 8 * 64 * 8
    assert found.macs == 3 * (outer + within) + batched
    assert found.products == 3 * 70 + 11
    assert found.other_cycles == {"layers/norm": 15}
    assert found.cycles == found.products + 15
    assert found.exposed_by_place == {"all-reduce of layers/out": 3 * 2 * 2 * 32 * 24 * 128}
    assert found.exposed == sum(found.exposed_by_place.values())
