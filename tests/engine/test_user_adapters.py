"""Users' adapters in an engine: rows of one batch with several, equal to merged weights and to PEFT."""

import argparse
import asyncio
import json
import re
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
import soundfile
from helpers.cases import golden_cases, media_of
from helpers.compilations import count_compilations
from helpers.merging import write_adapter, write_merged
from helpers.paths import TINY
from helpers.recordings import RATE, held_clips
from helpers.reference import uncached_logits
from safetensors.numpy import load_file, save_file

import phi4mm_jax
from infer import batch, chat, evaluate, generate, transcribe
from phi4mm_jax import CheckpointError, InputError
from phi4mm_jax.commands.options import adapter_of, add_adapter
from phi4mm_jax.engine import EngineConfig, Request

CONFIG = EngineConfig(
    slots=4, cache_tokens=1024, page_size=16, chunk=64, steps=4, max_adapters=3, max_adapter_rank=8,
    feature_blocks=16, beams=2,
)  # fmt: skip
PROMPT = "<|user|>hello there, this is a text of more than a page<|end|><|assistant|>"
NEW = 5


SIZES = {"legal": (4, 6.0), "medical": (8, 3.0), "tax": (2, 9.0)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    for seed, (name, (rank, alpha)) in enumerate(SIZES.items()):
        write_adapter(root / name, rank, alpha, seed)
    return {name: root / name for name in SIZES}


@pytest.fixture(scope="module")
def engine(tiny):
    """Compiled once for all tests, each of which leaves it without adapters."""
    return tiny.engine(CONFIG)


@pytest.fixture(autouse=True)
def _unloaded(request):
    yield
    if "engine" in request.fixturenames:
        engine = request.getfixturevalue("engine")
        for name in engine.adapters:
            engine.unload_adapter(name)


@pytest.fixture(scope="module")
def merged(tmp_path_factory, folders):
    """Checkpoints whose weights have an adapter's products added by numpy, by the adapter's name."""
    found = {}
    for name, (rank, alpha) in SIZES.items():
        matrices = load_file(folders[name] / "adapter_model.safetensors")
        folder = tmp_path_factory.mktemp(name) / "tiny"
        write_merged(folder, matrices, alpha / rank)
        found[name] = phi4mm_jax.load(folder, dtype="float32", scan=True)
    return found


def log_probabilities(model, tokens: np.ndarray, count: int, adapter: int = 0) -> np.ndarray:
    """Of the last tokens of a row, by the logits of the whole row: no engine, and no adapter of users."""
    batch = model.process([PROMPT])
    padded = np.zeros((1, 64), np.int32)
    padded[0, : len(tokens)] = tokens
    batch = batch._replace(
        tokens=padded, media=np.full_like(padded, -1), lengths=np.array([len(tokens)], np.int32),
        adapters=np.array([adapter], np.int32),
    )  # fmt: skip
    values = np.asarray(jax.nn.log_softmax(model.logits(batch)[0], -1))
    at = np.arange(len(tokens) - count, len(tokens))
    return values[at - 1, tokens[at]]


def answers(engine, asked) -> list:
    requests = [Request(PROMPT, max_new_tokens=NEW, adapter=adapter) for adapter in asked]
    return [answer for _, answer in sorted(engine.run(requests))]


def check_equal_to_merged(tiny, merged, asked, found):
    prompt = tiny.process([PROMPT])
    prompt = np.asarray(prompt.tokens[0, : prompt.lengths[0]])
    for adapter, answer in zip(asked, found, strict=True):
        assert answer.error is None
        builtin, _, name = (adapter or "").rpartition("+")
        model = merged.get(name, tiny)
        index = {"speech": 2, "vision": 1}.get(builtin, 0)
        expected = log_probabilities(model, np.concatenate([prompt, answer.tokens]), len(answer.tokens), index)
        np.testing.assert_allclose(answer.log_probabilities, expected, atol=1e-4, err_msg=str(adapter))


def test_rows_equal_weights_merged_with_their_adapter(engine, tiny, merged, folders):
    """Of three ranks, on top of speech, and without one, in one batch."""
    for name, folder in folders.items():
        engine.load_adapter(name, folder)
    asked = ["legal", "medical", "speech+legal", None, "tax"]
    found = answers(engine, asked)
    check_equal_to_merged(tiny, merged, asked, found)
    alone = [answers(engine, [adapter])[0] for adapter in asked[:2]]
    assert [answer.tokens for answer in alone] == [answer.tokens for answer in found[:2]]
    assert len({tuple(answer.tokens) for answer in found}) == len(found)


CASES = {case["name"]: case for case in golden_cases()}
BUILTIN = {"none": 0, "vision": 1, "speech": 2}
MEDIA = {  # case, what is asked for, the built-in adapter beneath, and the user's; in one batch
    "on speech": ("speech", "legal", "speech", "legal"), "another on speech": ("speech", "tax", "speech", "tax"),
    "alone": ("speech", "none+legal", "none", "legal"), "in speech's place": ("speech", "tuned", "none", "legal"),
    "on vision": ("vision", "legal", "vision", "legal"), "without": ("speech", None, "speech", None),
}  # fmt: skip


@pytest.fixture(scope="module")
def with_media(engine, folders, tmp_path_factory):
    """Answers to clips and an image, and of beams about a clip, by what is asked, of one batch."""
    tuned = tmp_path_factory.mktemp("tuned")
    shutil.copytree(folders["legal"], tuned / "speech-lora")
    for name, folder in {"legal": folders["legal"], "tax": folders["tax"], "tuned": tuned}.items():
        engine.load_adapter(name, folder)

    def request(case, adapter, **options):
        media = {kind: of_row[0] for kind, of_row in media_of(case).items()}
        return Request(case["prompt"], **media, max_new_tokens=NEW, adapter=adapter, **options)

    requests = [request(CASES[case], adapter) for case, adapter, *_ in MEDIA.values()]
    found = dict(engine.run([*requests, request(CASES["speech"], "legal", beams=2)]))
    assert all(answer.error is None for answer in found.values())
    return {name: found[i] for i, name in enumerate((*MEDIA, "beams"))}


@pytest.mark.parametrize("name", MEDIA)
def test_rows_with_media_equal_merged_weights(with_media, tiny, merged, name):
    """On top of speech and vision, alone, and in speech's place."""
    case, _, builtin, user = MEDIA[name]
    answer, model = with_media[name], merged.get(user, tiny)
    batch = model.process([CASES[case]["prompt"]], **media_of(CASES[case]))
    batch = batch._replace(adapters=np.array([BUILTIN[builtin]], np.int32))
    (logits,) = uncached_logits(model, batch, [answer.tokens])
    expected = np.asarray(jax.nn.log_softmax(logits, -1))[np.arange(len(answer.tokens)), answer.tokens]
    np.testing.assert_allclose(answer.log_probabilities, expected, atol=1e-4)
    assert answer.tokens == logits.argmax(-1).tolist()


@pytest.fixture(scope="module")
def peft_model(folders):
    """Transformers' model with the checkpoint's adapters and the users', by PEFT."""
    from helpers import torch_native

    native = torch_native.load_native(TINY)
    for name in ("legal", "tax"):
        torch_native.add_user_adapter(native.model, name, folders[name])
    return native


@pytest.mark.torch
def test_rows_with_media_equal_peft(with_media, tiny, peft_model):
    """Both adapters active in PEFT, or the user's alone; and transformers' beam search with both."""
    import torch
    from helpers.native_cases import native_inputs

    for name, (case, _, builtin, user) in MEDIA.items():
        answer = with_media[name]
        tokens, images, clips, _ = native_inputs(tiny, CASES[case])
        active = [kind for kind in (builtin, user) if kind not in ("none", None)]
        whole = np.concatenate([tokens, answer.tokens[:-1]])
        logits = peft_model.logits(whole, images, clips, active)[-len(answer.tokens) :]
        expected = np.asarray(jax.nn.log_softmax(logits, -1))[np.arange(len(answer.tokens)), answer.tokens]
        np.testing.assert_allclose(answer.log_probabilities, expected, atol=3e-4, err_msg=name)
    tokens, _, (clip,), _ = native_inputs(tiny, CASES["speech"])
    media = {"audio_input_features": torch.tensor(clip)[None], "audio_embed_sizes": torch.tensor([-(-len(clip) // 8)])}
    answers, scores = peft_model.beam_search(
        tokens, beams=2, new_tokens=NEW, penalty=1.0, stops=tiny.config.stop_token_ids, adapter=["speech", "legal"],
        **media,
    )  # fmt: skip
    assert [found.tokens for found in with_media["beams"].alternatives] == answers
    np.testing.assert_allclose([found.score for found in with_media["beams"].alternatives], scores, atol=3e-4)


def test_nothing_compiles_when_adapters_come_and_go(engine, tiny, merged, folders):
    """Loaded, unloaded and replaced under one name; no page of the prefix cache is taken for another adapter's."""
    engine.load_adapter("mine", folders["legal"])
    first = answers(engine, ["mine"])[0]
    before = count_compilations()
    engine.unload_adapter("mine")
    engine.load_adapter("other", folders["tax"])
    engine.load_adapter("mine", folders["medical"])
    prefilled = engine.runner.num_prefilled_tokens
    second = answers(engine, ["mine"])[0]
    prompt = tiny.process([PROMPT])
    assert engine.runner.num_prefilled_tokens - prefilled == prompt.lengths[0]
    assert prompt.lengths[0] > CONFIG.page_tokens
    assert count_compilations() == before
    check_equal_to_merged(tiny, merged, ["medical"], [second])
    assert first.tokens != second.tokens


def test_requests_of_an_unloaded_adapter_end_with_it(engine, folders):
    """Its place is free after them; a request that comes later is told."""
    engine.load_adapter("legal", folders["legal"])
    expected = answers(engine, ["legal"])[0]
    number = engine.submit(Request(PROMPT, max_new_tokens=NEW, adapter="legal"))
    engine.unload_adapter("legal")
    for name in ("medical", "tax"):
        engine.load_adapter(name, folders[name])
    with pytest.raises(InputError, match="finds all 3 places taken"):
        engine.load_adapter("legal", folders["legal"])
    late = engine.submit(Request(PROMPT, adapter="legal"))
    found = {}
    while len(found) < 2:
        found |= {u.id: u.completion for u in engine.updates_of({number, late}) if u.completion is not None}
    assert found[number].tokens == expected.tokens
    assert found[late].error == "adapter is 'legal'; expected one of none, vision, speech, medical, tax"
    engine.load_adapter("legal", folders["legal"])


def test_an_export_takes_the_place_of_the_built_in_adapter(engine, folders, tmp_path):
    """As its folder's name says; nothing else goes beneath it."""
    shutil.copytree(folders["legal"], tmp_path / "tuned" / "speech-lora")
    engine.load_adapter("tuned", tmp_path / "tuned")
    engine.load_adapter("plain", folders["legal"])
    found = answers(engine, ["tuned", "speech+tuned", "none+plain", "speech+plain", "vision+tuned"])
    assert found[0].tokens == found[1].tokens == found[2].tokens != found[3].tokens
    assert "but tuned takes the place of speech" in found[4].error


def test_what_cannot_be_loaded_is_refused_by_name(engine, tiny, folders, tmp_path):
    write_adapter(tmp_path / "wide", 16, 1.0, 0)
    write_adapter(tmp_path / "dora", 4, 1.0, 0, use_dora=True)
    write_adapter(tmp_path / "whole", 4, 1.0, 0, modules_to_save=["lm_head"])
    zero = write_adapter(tmp_path / "zero", 4, 1.0, 0)
    file = tmp_path / "zero" / "adapter_model.safetensors"
    save_file({n: x * 0 if "lora_B" in n else x for n, x in zero.items()}, file)
    (tmp_path / "empty").mkdir()
    refused = {
        "wide": (InputError, r"rank 16, but the engine has room for 8"), "dora": (Exception, "use_dora is True"),
        "whole": (Exception, "modules_to_save is"), "zero": (CheckpointError, "all its B matrices are zero"),
        "empty": (CheckpointError, "holds no adapter"), "absent": (CheckpointError, "no such folder"),
    }  # fmt: skip
    for name, (kind, cause) in refused.items():
        with pytest.raises(kind, match=cause):
            engine.load_adapter("mine", tmp_path / name)
    for name in ("speech", "none", "a b", "../a", "a+b", ""):
        with pytest.raises(InputError, match="adapter name is"):
            engine.load_adapter(name, folders["legal"])
    engine.load_adapter("legal", folders["legal"])
    with pytest.raises(InputError, match="'legal' is loaded already"):
        engine.load_adapter("legal", folders["tax"])
    with pytest.raises(InputError, match="'tax' is not loaded; loaded are: legal"):
        engine.unload_adapter("tax")
    with pytest.raises(InputError, match="has no place in this engine"):
        tiny.engine(EngineConfig(slots=1, cache_tokens=64)).load_adapter("legal", folders["legal"])


@pytest.fixture
def program(engine, tiny, monkeypatch):
    """Runs a program with this module's engine, which has room for the adapters that the program loads."""

    def run(module, *arguments) -> int:
        for name in engine.adapters:
            engine.unload_adapter(name)
        configs = []
        model = SimpleNamespace(processor=tiny.processor, engine=lambda config: configs.append(config) or engine)
        monkeypatch.setattr(module, "load_model", lambda *_, **__: model)
        monkeypatch.setattr(sys, "argv", ["x", "--model", str(TINY), "--dtype", "float32", *map(str, arguments)])
        status = module.main()
        assert [(c.max_adapters, c.max_adapter_rank) for c in configs] in ([], [(len(engine.adapters), 8)])
        return status

    return run


@pytest.fixture
def loads(folders) -> list[str]:
    return [f"--adapter={name}={folders[name]}" for name in ("legal", "medical")]


def own_answer(engine, folders, name, prompt, **options) -> Any:
    """The engine's answer with an adapter, which equals that of merged weights."""
    for loaded in engine.adapters:
        engine.unload_adapter(loaded)
    engine.load_adapter(name, folders[name])
    ((_, answer),) = engine.run([Request(prompt, max_new_tokens=NEW, adapter=name, **options)])
    assert answer.error is None
    return answer


HELLO = [{"role": "user", "content": "hello"}]
SHORT = ["--max-new-tokens", NEW]


def test_the_adapter_that_is_loaded_answers(program, engine, folders, loads, capfd, monkeypatch, tmp_path):
    """In infer.generate, infer.chat, infer.evaluate and infer.transcribe; of several, the one that is named."""
    expected = own_answer(engine, folders, "medical", HELLO).text
    assert program(generate, *loads[1:], *SHORT, "hello") == 0
    assert program(generate, *loads, "--adapter", "medical", *SHORT, "hello") == 0
    assert capfd.readouterr().out == f"{expected}\n" * 2
    assert program(generate, *loads, *SHORT, "hello") == 2
    assert "--adapter loads legal, medical; say which one answers, such as --adapter legal" in capfd.readouterr().err
    typed = iter(["hello"])
    monkeypatch.setattr("builtins.input", lambda _: next(typed, None) or (_ for _ in ()).throw(EOFError))
    assert program(chat, *loads[1:], *SHORT) == 0
    assert capfd.readouterr().out == f"{expected}\n"
    (tmp_path / "m.jsonl").write_text(json.dumps({"messages": [*HELLO, {"role": "assistant", "content": "x"}]}))
    run = ["--task", "exact", tmp_path / "m.jsonl", *SHORT, "--output", tmp_path / "out"]
    assert program(evaluate, *run, *loads[1:]) == 0
    assert json.loads((tmp_path / "out" / "answers.jsonl").read_text())["text"] == expected
    assert program(evaluate, *run) == 2
    assert "holds answers of other weights" in capfd.readouterr().err
    samples, _ = held_clips(1)[0]
    soundfile.write(tmp_path / "a.wav", samples, RATE, "FLOAT")
    asked = [{"type": "audio", "audio": (samples, RATE)}, {"type": "text", "text": "hear"}]
    heard = own_answer(engine, folders, "medical", [{"role": "user", "content": asked}]).text
    assert program(transcribe, *loads[1:], *SHORT, "--prompt", "hear", tmp_path / "a.wav") == 0
    assert capfd.readouterr().out == f"{heard.strip()}\n"


def test_lines_of_a_batch_ask_for_adapters(program, engine, folders, loads, tmp_path, capfd):
    """Those that do not say have that of their media, or the one that is named; other weights are other answers."""
    legal, medical = (own_answer(engine, folders, name, PROMPT).tokens for name in ("legal", "medical"))
    engine.unload_adapter("medical")
    plain = answers(engine, [None])[0].tokens
    lines = [{"prompt": PROMPT, "adapter": name} for name in ("legal", "medical", "none", "none+legal")]
    (tmp_path / "in").write_text("\n".join(map(json.dumps, [*lines, {"prompt": PROMPT}])))
    files = ["--input", tmp_path / "in", "--ordered", "--compilation-cache", "", *SHORT, "--output"]

    def tokens(name: str) -> list[list[int]]:
        return [json.loads(line)["tokens"] for line in (tmp_path / name).read_text().splitlines()]

    assert program(batch, *files, tmp_path / "out", *loads) == 0
    assert tokens("out") == [legal, medical, plain, legal, plain]
    assert program(batch, *files, tmp_path / "other", *loads, "--adapter", "medical") == 0
    assert tokens("other") == [legal, medical, plain, legal, medical]
    assert program(batch, *files, tmp_path / "out", loads[0], f"--adapter=medical={folders['tax']}") == 2
    assert "its answers are of another user_adapters (was {'legal': " in capfd.readouterr().err


def test_rows_of_a_data_set_ask_for_adapters(engine, folders):
    pa = pytest.importorskip("pyarrow")
    pytest.importorskip("ray")
    from phi4mm_jax.ray.answer import Answer

    expected = own_answer(engine, folders, "legal", PROMPT).tokens
    answerer = Answer(
        TINY, dtype="float32", scan=True, engine=asdict(CONFIG), defaults={"max_new_tokens": NEW},
        user_adapters={"legal": folders["legal"]},
    )  # fmt: skip
    found = asyncio.run(answerer(pa.table({"prompt": [PROMPT], "adapter": ["legal"]}))).to_pylist()
    assert found[0]["tokens"] == expected


def openai_line(**body: Any) -> bytes:
    return json.dumps({"custom_id": "a", "body": {"messages": HELLO, **body}}).encode()


def test_lines_of_openai_ask_for_adapters_by_model(program, engine, folders, loads, tmp_path):
    """As of the server, or by `adapter`, as lines of ours; another model's name changes nothing."""
    legal = own_answer(engine, folders, "legal", HELLO).tokens
    ((_, plain),) = engine.run([Request(HELLO, max_new_tokens=NEW)])
    asked = {
        "a": {"model": "legal"}, "b": {"adapter": "legal"}, "c": {"model": "legal", "adapter": "none"},
        "d": {"model": "gpt-4o", "adapter": "none+legal"}, "e": {"model": "gpt-4o"},
        "f": {"model": "legal", "adapter": "medical"}, "g": {"model": ["legal"]},
    }  # fmt: skip
    lines = [{"custom_id": name, "body": {"messages": HELLO, **body}} for name, body in asked.items()]
    (tmp_path / "in").write_text("\n".join(map(json.dumps, lines)))
    files = ["--input", tmp_path / "in", "--ordered", "--compilation-cache", "", *SHORT, "--output"]
    assert program(batch, *files, tmp_path / "out", *loads) == 1
    found = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert [line.get("tokens") for line in found] == [legal] * 4 + [plain.tokens, None, plain.tokens]
    assert "body.model is 'legal' and body.adapter is 'medical'; leave one out" in found[5]["error"]


@pytest.mark.parametrize(("body", "expected"), [
    ({"model": "legal"}, "legal"), ({"model": "legal", "adapter": "speech"}, "speech+legal"), ({"model": "tax"}, None),
])  # fmt: skip
def test_lines_of_openai_ask_ray_for_adapters(body, expected, tmp_path, monkeypatch):
    """The index of the lines and the engines read them alike."""
    pytest.importorskip("pyarrow")
    pytest.importorskip("ray")
    from phi4mm_jax.ray import inputs, run

    asked = []

    async def refuse(self, line):
        asked.append(line.request.adapter)
        return "refused"

    monkeypatch.setattr(run.AnswerLines, "answer_line", refuse)
    answerer = run.AnswerLines.__new__(run.AnswerLines)
    answerer._form, answerer.settings, answerer._adapters = "plain", {"max_new_tokens": NEW}, ("legal",)
    asyncio.run(answerer._answered(0, openai_line(**body), "x", "x"))
    assert asked == [expected]
    (tmp_path / "in").write_bytes(openai_line(**body) + b"\n" + openai_line(model="legal", adapter="tax"))
    index = inputs.index_file("in", str(tmp_path / "in"), {"max_new_tokens": NEW}, ("legal",))
    assert index.broken.tolist() == [False, True]


def option_of(*options: str) -> str | None:
    parser = argparse.ArgumentParser()
    add_adapter(parser, "")
    return adapter_of(parser.parse_args([word for option in options for word in ("--adapter", option)]))


def test_what_the_option_asks_for():
    asked = [(), ("speech",), ("a=A",), ("a=A", "b=B", "b"), ("a=A", "none+a")]
    assert [option_of(*options) for options in asked] == [None, "speech", None, "b", "none+a"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["a"], "--adapter is 'a'; expected one of none, vision, speech, or NAME=FOLDER"),
        (["a=A", "b"], "expected one of none, vision, speech, a, or NAME=FOLDER"),
        (["a=A", "nothing+a"], "--adapter is 'nothing+a'; expected one of"),
        (["a=A", "a=B"], "--adapter has a twice: A and B"),
        (["speech=A"], "adapter name is 'speech'"),
        (["speech", "vision"], "--adapter asks for speech and for vision; give one, or NAME=FOLDER"),
        (["a="], "--adapter is 'a='; expected NAME=FOLDER"),
    ],
)
def test_what_the_option_cannot_ask_for(options, message):
    with pytest.raises(InputError, match=re.escape(message)):
        option_of(*options)
