"""Settings of a checkpoint that transformers would obey: those that change answers and are not used are named."""

import json
import shutil

import pytest
from helpers.paths import TINY

import phi4mm_jax
from phi4mm_jax.checkpoint.convert import to_torch
from phi4mm_jax.checkpoint.unused_settings import unused_of_adapter, unused_settings
from phi4mm_jax.config import Phi4MMConfig
from phi4mm_jax.engine import EngineConfig
from phi4mm_jax.engine.user_adapters import read_user_adapter
from phi4mm_jax.processing.tokenizer import Tokenizer

SMALL = TINY.parents[2] / "assets" / "tiny"
RELEASE = json.loads((TINY / "tokenizer_config.json").read_text())["chat_template"]
PREFACE = "{{ '<|system|>Be brief.<|end|>' }}"
# That with which transformers tests its processor.
WITH_PARTS = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "{{ '<|image|>' }}{% elif content['type'] == 'audio' %}{{ '<|audio|>' }}{% elif content['type'] == 'text' %}"
    "{{ content['text'] }}{% endif %}{% endfor %}{% endif %}{% if message['role'] == 'system' and 'tools' in message "
    "and message['tools'] is not none %}{{ '<|tool|>' + message['tools'] + '<|/tool|>' + '<|end|>' }}{% endif %}"
    "{{ '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)


def lines_of(folder) -> list[str]:
    return list(unused_settings(folder, Phi4MMConfig.from_folder(folder), Tokenizer.from_folder(folder)))


@pytest.fixture
def folder(tmp_path):
    """A checkpoint without its tensors."""
    copy = tmp_path / "checkpoint"
    shutil.copytree(TINY, copy, ignore=shutil.ignore_patterns("goldens*", "inputs", "model*"))
    return copy


def generating(folder, **values):
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


def test_releases_and_exports_are_silent(tmp_path):
    to_torch(TINY, tmp_path / "native", "native")
    to_torch(tmp_path / "native", tmp_path / "original", "original")
    for path in (TINY, SMALL, tmp_path / "native", tmp_path / "original"):
        assert lines_of(path) == []
    assert (tmp_path / "native" / "chat_template.jinja").read_text() != RELEASE


@pytest.mark.parametrize(("values", "named"), [
    ({"repetition_penalty": 1.5, "no_repeat_ngram_size": 3, "suppress_tokens": [98], "_from_model_config": True},
     "repetition_penalty (1.5), no_repeat_ngram_size (3), suppress_tokens ([98])"),
    ({"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 50},
     "do_sample (True), temperature (0.7), top_k (50), top_p (0.9)"),
    ({"do_sample": True, "temperature": 1.0, "top_p": 1.0}, "do_sample (True)"),
    ({"num_beams": 4, "length_penalty": 0.5, "early_stopping": False}, "num_beams (4), length_penalty (0.5)"),
    ({"max_new_tokens": 64, "max_length": 100}, "max_new_tokens (64), max_length (100)"),
])  # fmt: skip
def test_settings_of_generation_that_change_answers_are_named(folder, values, named):
    (line,) = lines_of(generating(folder, **values))
    assert line.startswith(f"{folder / 'generation_config.json'}: not used: {named}. Answers are greedy")


def test_settings_of_generation_in_config_json_stand_in_for_a_missing_file(folder):
    """As in transformers: beside a generation_config.json they are not read."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"do_sample": True, "temperature": 0.7}))
    assert lines_of(folder) == []
    (folder / "generation_config.json").unlink()
    (line,) = lines_of(folder)
    assert line.startswith(f"{path}: not used: do_sample (True), temperature (0.7). Answers are greedy")


def test_settings_of_generation_that_change_none_are_silent(folder):
    """transformers' defaults, what only sampling and beams read, and lengths beyond the context."""
    values = {
        "do_sample": False, "temperature": 0.7, "top_p": 0.9, "top_k": 50, "length_penalty": 0.5, "num_beams": 1,
        "repetition_penalty": 1.0, "max_length": 131072, "use_cache": True, "suppress_tokens": None,
        "no_repeat_ngram_size": 0, "transformers_version": "5.0.0",
    }  # fmt: skip
    assert lines_of(generating(folder, **values)) == []


@pytest.mark.parametrize(("template", "is_named"), [
    (RELEASE + "\n", False),
    (WITH_PARTS, False),
    (None, False),
    (PREFACE + RELEASE, True),
    ([{"name": "default", "template": RELEASE}, {"name": "brief", "template": PREFACE + RELEASE}], False),
    ([{"name": "default", "template": PREFACE + RELEASE}], True),
])  # fmt: skip
def test_a_chat_template_that_renders_otherwise_is_named(folder, template, is_named):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    found = lines_of(folder)
    assert len(found) == is_named
    assert all(line.startswith(f"{folder}: its chat template is not the release's") for line in found)


def test_load_logs_them(folder, caplog):
    for path in TINY.glob("model*"):
        shutil.copy(path, folder)
    generating(folder, repetition_penalty=1.5)
    (folder / "chat_template.jinja").write_bytes(b"\xff")  # transformers reads it first
    phi4mm_jax.load(folder, dtype="float32")
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert "repetition_penalty (1.5)" in caplog.text
    assert "its chat template is not the release's" in caplog.text


@pytest.mark.parametrize(("template", "named"), [(None, 0), (RELEASE, 0), (PREFACE + RELEASE, 1)])
def test_an_adapters_chat_template_is_named(folder, tmp_path, caplog, template, named):
    """Trainers save the template that they trained with beside the adapter."""
    for path in TINY.glob("model*"):
        shutil.copy(path, folder)
    shutil.copytree(TINY / "speech-lora", tmp_path / "tuned")
    if template is not None:
        (tmp_path / "tuned" / "chat_template.jinja").write_text(template)
    model = phi4mm_jax.load(folder, dtype="float32", adapters={"speech": tmp_path / "tuned"})
    read_user_adapter("mine", tmp_path / "tuned", model.config, model.processor.tokenizer, EngineConfig(max_adapters=1))
    line = f"{tmp_path / 'tuned'}: its chat template is not the release's"
    assert [record.getMessage().startswith(line) for record in caplog.records] == [True, True] * named


@pytest.mark.parametrize(("file", "content", "named"), [
    ("tokenizer.json", {"added_tokens": [{"id": 300, "content": "<box>"}, {"id": 633, "content": "<|endoftext|>"}]},
     "'<box>' (300)"),
    ("tokenizer_config.json", {"added_tokens_decoder": {"300": {"content": "<box>"}}}, "'<box>' (300)"),
    ("added_tokens.json", {"<box>": 300, "<|end|>": 7}, "'<box>' (300), '<|end|>' (7)"),
    ("tokenizer.json", {"added_tokens": [{"id": 633, "content": "<|endoftext|>"}]}, None),
])  # fmt: skip
def test_tokens_of_an_adapter_that_the_base_has_not_are_named(tmp_path, file, content, named):
    (tmp_path / file).write_text(json.dumps(content))
    found = list(unused_of_adapter(tmp_path, Tokenizer.from_folder(TINY)))
    begin = f"{tmp_path}: its tokenizer has tokens that the base's has not, by which prompts are read: {named}. If"
    assert [line.startswith(begin) for line in found] == [True] * (named is not None)


def test_a_tokenizer_beside_an_adapter_may_be_broken(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    (line,) = unused_of_adapter(tmp_path, Tokenizer.from_folder(TINY))
    assert str(tmp_path / "tokenizer.json") in line
    assert line.endswith("It is not used")
