"""An adapter that is part of the weights."""

import json
import sys

import numpy as np
import pytest
from helpers.cases import golden_cases, media_of, rows_of
from helpers.marks import fast_are
from helpers.paths import TINY

import phi4mm_jax
from infer import batch
from phi4mm_jax.mesh import make_mesh


@pytest.fixture(scope="module", params=fast_are(["speech"], ["vision", "speech"]))
def merged(request):
    return phi4mm_jax.load(TINY, dtype="float32", merge=request.param, scan=True)  # less to compile


def kind_of(case):
    return "vision" if case["images"] else "speech" if case["audios"] else None


def test_its_own_prompts_are_answered_as_before(merged, goldens):
    """Logits of all cases, as rows of one batch, and the tokens of the shortest."""
    cases = sorted((c for c in golden_cases() if kind_of(c) == merged.processor.merged), key=lambda c: c["tokens"])
    assert len(cases) > 2
    assert set(merged.variables) == {"params"}
    for case, logits in zip(cases, merged.logits(merged.process(*rows_of(cases))), strict=True):
        last = goldens[f"{case['name']}.logits"]
        np.testing.assert_allclose(logits[: case["tokens"]][-len(last) :], last, atol=3e-4, err_msg=case["name"])
    expected = goldens[f"{cases[0]['name']}.generated"].tolist()
    (completion,) = merged.generate(*rows_of(cases[:1]), max_new_tokens=len(expected))
    assert completion.tokens == expected


def test_other_prompts_are_refused(merged):
    name = merged.processor.merged
    for case in golden_cases():
        if kind_of(case) != name:
            with pytest.raises(phi4mm_jax.InputError, match=f"{name} adapter is merged"):
                merged.process([case["prompt"]], **media_of(case))


def test_the_batch_program_merges_and_resumes_with_the_same_alone(merged, tiny, goldens, tmp_path, monkeypatch, capsys):
    """--merge: its prompts are answered, lines with other adapters are not; another adapter or limit is refused."""
    name = merged.processor.merged
    other = "speech" if name == "vision" else "vision"
    case = next(c for c in golden_cases() if kind_of(c) == name)
    media = {kind: [str(path) for path in of_row[0]] for kind, of_row in media_of(case).items()}
    lines = [{"id": "own", "prompt": case["prompt"], **media}, {"id": "none", "prompt": "a", "adapter": "none"}]
    (tmp_path / "in").write_text("".join(json.dumps(line) + "\n" for line in lines))
    models = {None: tiny, name: merged}
    monkeypatch.setattr(batch.phi4mm_jax, "load", lambda path, *, merge, **_: models[merge])

    def run(*arguments) -> tuple[int, str]:
        given = {"--model": TINY, "--input": tmp_path / "in", "--output": tmp_path / "out", "--dtype": "float32",
                 "--compilation-cache": "", "--cache-tokens": 4096}  # fmt: skip
        words = [str(word) for pair in given.items() for word in pair]
        monkeypatch.setattr(sys, "argv", ["batch", "--ordered", *words, *map(str, arguments)])
        return batch.main(), capsys.readouterr().err

    assert run("--merge", name, "--max-new-tokens", 3)[0] == 1  # a line has failed
    own, none = map(json.loads, (tmp_path / "out").read_text().splitlines())
    assert own["tokens"] == goldens[f"{case['name']}.generated"][:3].tolist()
    assert f"the {name} adapter is merged" in none["error"]
    before = (tmp_path / "out").read_bytes()
    for arguments, named in (
        ((), f"merge (was '{name}', now None)"), (("--merge", other), f"merge (was '{name}', now '{other}')"),
        (("--merge", name, "--max-new-tokens", 4), "max_new_tokens (was 3, now 4)"),
    ):  # fmt: skip
        limit = () if "--max-new-tokens" in arguments else ("--max-new-tokens", 3)
        status, error = run(*arguments, *limit)
        assert status == 2
        assert f"its answers are of another {named}; give another output" in error
    assert (tmp_path / "out").read_bytes() == before


@pytest.mark.slow
def test_logits_of_a_merged_adapter_on_a_mesh(goldens):
    mesh = make_mesh(fsdp=2, tensor=2)
    plain, model = (phi4mm_jax.load(TINY, dtype="float32", mesh=mesh, merge=m) for m in (None, "speech"))
    weights = [m.variables["params"]["decoder"]["layers_0"]["mlp"]["gate_up"]["gate"] for m in (plain, model)]
    assert weights[0].sharding == weights[1].sharding
    assert not np.allclose(*weights)
    case = next(c for c in golden_cases() if kind_of(c) == "speech")
    logits = model.logits(model.process([case["prompt"]], **media_of(case)))[0, : case["tokens"]]
    last = goldens[f"{case['name']}.logits"]
    np.testing.assert_allclose(logits[-len(last) :], last, atol=3e-4)


def test_an_unknown_adapter():
    with pytest.raises(phi4mm_jax.InputError, match="merge is 'text'"):
        phi4mm_jax.load(TINY, merge="text")
