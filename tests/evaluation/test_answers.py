"""Answers to items: their adapters, and the settings that they depend on."""

import dataclasses
import itertools
import json
import os
import shutil

import jax
import numpy as np
import pytest
from helpers.manifests import user
from helpers.paths import TINY

import phi4mm_jax
from phi4mm_jax import InputError
from phi4mm_jax.engine import Engine, EngineConfig, Request
from phi4mm_jax.evaluation.answers import answer_file, settings_of
from phi4mm_jax.evaluation.items import Item

CLIP = TINY / "inputs" / "audio_0.flac"
SMALL = EngineConfig(slots=1, cache_tokens=2048)


@pytest.mark.slow
def test_a_request_may_name_its_adapter(tiny):
    """With none it is that of a model without adapters; with another, the network's for a row that has that one."""
    prompt = "<|user|><|audio_1|>What?<|end|><|assistant|>"
    names = ["none", "vision", "speech", None]
    requests = [Request(prompt, audios=[CLIP], max_new_tokens=1, adapter=name) for name in names]
    answers = dict(tiny.engine(SMALL).run(requests))
    assert answers[2] == answers[3]
    assert answers[2].log_probabilities == answers[3].log_probabilities
    without = Engine(tiny.programs, {"params": tiny.variables["params"]}, tiny.processor, SMALL)
    ((_, bare),) = without.run([Request(prompt, audios=[CLIP], max_new_tokens=1)])
    assert (answers[0], answers[0].log_probabilities) == (bare, bare.log_probabilities)
    batch = tiny.process([prompt], audios=[[CLIP]])
    logits = tiny.logits(batch._replace(adapters=np.asarray([1], np.int32)))[0, batch.lengths[0] - 1]
    expected = np.asarray(jax.nn.log_softmax(logits))
    assert answers[1].tokens == [int(expected.argmax())]
    assert answers[1].log_probabilities[0] == pytest.approx(expected.max(), abs=1e-4)
    for one, other in itertools.combinations(range(3), 2):
        assert abs(answers[one].log_probabilities[0] - answers[other].log_probabilities[0]) > 1e-2


def test_adapters_that_are_not_there(tiny):
    ((_, unknown),) = tiny.engine(SMALL).run([Request("a", adapter="voice")])
    assert unknown.error == "adapter is 'voice'; expected one of none, vision, speech"
    merged = phi4mm_jax.load(TINY, dtype="float32", merge="speech")
    prompt = [user({"type": "audio", "audio": str(CLIP)}, "What?")]
    for adapter in ("none", "speech"):
        ((_, answer),) = merged.engine(SMALL).run([Request(prompt, max_new_tokens=1, adapter=adapter)])
        assert answer.error.startswith(f"adapter is '{adapter}', but the speech adapter is merged")


def test_a_checkpoint_without_the_adapter(tmp_path):
    config = json.loads((TINY / "config.json").read_text())
    config["vision_lora"] = None
    (tmp_path / "config.json").write_text(json.dumps(config))
    from phi4mm_jax.evaluation.answers import check_adapter

    check_adapter(tmp_path, "speech")
    check_adapter(tmp_path, "none")
    with pytest.raises(InputError, match=r"has no vision adapter \(it has speech\); choose another"):
        check_adapter(tmp_path, "vision")


def test_a_run_is_resumed_with_the_same_weights_alone(tmp_path):
    """Those of a copy, whatever its dates, are the same; one value among 786,432 makes others."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(bytes(3 << 20))
    shutil.copytree(tmp_path / "model", tmp_path / "copy")
    os.utime(tmp_path / "copy" / "model.safetensors", (0, 0))
    items = [Item("m: line 1", None, [user("A?")], ("a",))]

    def claim(model, dtype="float32", adapter=None, max_new_tokens=3, of=items):
        with answer_file(tmp_path / "run", settings_of(tmp_path / model, dtype, adapter, max_new_tokens, of), of):
            pass

    claim("model")
    claim("copy")
    for changed, named in (
        ({"dtype": "bfloat16"}, "dtype"), ({"adapter": "none"}, "adapter"), ({"max_new_tokens": 4}, "max_new_tokens"),
        ({"of": [dataclasses.replace(items[0], prompt=[user("B?")])]}, "prompts"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=rf"run: holds answers of other {named} \(.*, now .*\); give another"):
            claim("model", **changed)
    with_adapter = settings_of(tmp_path / "model", "float32", None, 3, items)
    with_adapter = dataclasses.replace(with_adapter, weights=f"{with_adapter.weights} legal=12-in-place-of-speech")
    with (
        pytest.raises(InputError, match=r"run: holds answers of other weights \(by legal\)"),
        answer_file(tmp_path / "run", with_adapter, items),
    ):
        pass
    with (tmp_path / "copy" / "model.safetensors").open("r+b") as file:
        file.seek(2 << 20)
        file.write(b"\x01")
    with pytest.raises(InputError, match=r"run: holds answers of other weights \(of \S+model, now \S+copy\)"):
        claim("copy")
