"""An adapter that is part of the weights."""

import numpy as np
import pytest
from conftest import TINY, golden_cases, media_of

import phi4mm_jax
from phi4mm_jax.sharding import make_mesh


@pytest.fixture(scope="module", params=["vision", "speech"])
def merged(request):
    return phi4mm_jax.load(TINY, dtype="float32", merge=request.param)


def kind_of(case):
    return "vision" if case["images"] else "speech" if case["audios"] else None


def test_its_own_prompts_are_answered_as_before(merged, goldens):
    cases = [c for c in golden_cases() if kind_of(c) == merged.processor.merged]
    assert len(cases) > 2
    assert set(merged.variables) == {"params"}
    for case in cases:
        media = media_of(case)
        logits = merged.logits(merged.process([case["prompt"]], **media))[0, : case["tokens"]]
        last = goldens[f"{case['name']}.logits"]
        np.testing.assert_allclose(logits[-len(last) :], last, atol=3e-4, err_msg=case["name"])
        expected = goldens[f"{case['name']}.generated"].tolist()
        assert merged.generate([case["prompt"]], **media, max_new_tokens=len(expected))[0].tokens == expected


def test_other_prompts_are_refused(merged):
    name = merged.processor.merged
    for case in golden_cases():
        if kind_of(case) != name:
            with pytest.raises(phi4mm_jax.InputError, match=f"{name} adapter is merged"):
                merged.process([case["prompt"]], **media_of(case))


def test_it_spreads_over_a_mesh(goldens):
    mesh = make_mesh(fsdp=2, tensor=2)
    plain, model = (phi4mm_jax.load(TINY, dtype="float32", mesh=mesh, merge=m) for m in (None, "speech"))
    weights = [m.variables["params"]["decoder"]["layers"]["mlp"]["gate_up"]["gate"] for m in (plain, model)]
    assert weights[0].sharding == weights[1].sharding
    assert not np.allclose(*weights)
    case = next(c for c in golden_cases() if kind_of(c) == "speech")
    logits = model.logits(model.process([case["prompt"]], **media_of(case)))[0, : case["tokens"]]
    last = goldens[f"{case['name']}.logits"]
    np.testing.assert_allclose(logits[-len(last) :], last, atol=3e-4)


def test_an_unknown_adapter():
    with pytest.raises(phi4mm_jax.InputError, match="merge is 'text'"):
        phi4mm_jax.load(TINY, merge="text")
