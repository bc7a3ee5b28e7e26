"""JSON that users bring: nothing in it is lost, wherever it is read."""

import json
import shutil
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.paths import TINY
from safetensors.numpy import save_file

from convert.record import read_requests as read_cases
from phi4mm_jax import CheckpointError, InputError
from phi4mm_jax.checkpoint.safetensors_io import read_header
from phi4mm_jax.config import Phi4MMConfig
from phi4mm_jax.data.conversation import read_conversation
from phi4mm_jax.data.examples import BadSample
from phi4mm_jax.data.filters import read_lines
from phi4mm_jax.data.manifests import open_manifest
from phi4mm_jax.engine.jsonl import read_requests
from phi4mm_jax.processing.chat import _calls
from phi4mm_jax.processing.processor import Processor
from phi4mm_jax.utils.progress import progress_bar, weights_bar
from phi4mm_jax.utils.strict_json import parse_json

TWICE = '{"a": 1, "b": {"key": 1, "key": 2}}'


def written(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def copied(folder: Path, name: str) -> Path:
    """A copy of the tiny checkpoint, one of whose files has a key twice."""
    shutil.copytree(TINY, folder / "copy", ignore=shutil.ignore_patterns("goldens*", "inputs", "*.safetensors"))
    text = (folder / "copy" / name).read_text()
    written(folder / "copy" / name, text.replace("{", '{"key": 1, "key": 2, ', 1))
    return folder / "copy"


def tensors(path: Path) -> Path:
    """A file of tensors, one of which has its dtype twice."""
    save_file({"x": np.zeros(2, np.float32)}, path)
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = whole[8 : 8 + length].rstrip().replace(b'"dtype":"F32"', b'"dtype":"F32","dtype":"F32"')
    return written(path, len(header).to_bytes(8, "little") + header + whole[8 + length :])


CALL = {"function": {"name": "f", "arguments": TWICE}}


def first_sample(path):
    with closing(open_manifest(path)) as manifest:
        return manifest.read(0)


READERS = {
    "settings": lambda p: Phi4MMConfig.from_folder(copied(p, "config.json")),
    "tokenizer": lambda p: Processor.from_folder(copied(p, "tokenizer.json"), Phi4MMConfig.from_folder(TINY)),
    "tensors": lambda p: read_header(tensors(p / "x.safetensors")),
    "manifest": lambda p: first_sample(written(p / "m.jsonl", TWICE)),
    "filter": lambda p: list(read_lines(written(p / "m.jsonl", TWICE))),
    "messages": lambda p: read_conversation({"messages": f"[{TWICE}]"}),
    "arguments": lambda p: list(_calls("tool_calls", [CALL])),
    "cases": lambda p: read_cases(written(p / "cases.json", '{"cases": [], "key": 1, "key": 2}'), 1),
}


@pytest.mark.parametrize("reader", READERS)
def test_key_that_is_there_twice(tmp_path, reader):
    with pytest.raises((InputError, BadSample, CheckpointError), match=r"'key' is in one object twice|duplicate field"):
        READERS[reader](tmp_path)


def test_key_that_is_twice_in_a_request(tmp_path):
    path = written(tmp_path / "in.jsonl", '{"prompt": "a", "prompt": "b"}\n{"prompt": "c"}\n')
    first, second = read_requests(path, max_new_tokens=1)
    assert first.error is not None
    assert "line 1 is not JSON ('prompt' is in one object twice)" in first.error
    assert second.error is None


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_numbers_that_json_lacks(tmp_path, number):
    with pytest.raises(BadSample, match=f"not JSON \\({number} is no number in JSON"):
        first_sample(written(tmp_path / "m.jsonl", f'{{"x": {number}}}'))


def test_all_else_is_read_as_json_has_it():
    text = '{"a": [1, 2.5, -1e3, null, true, "\\u00e9"], "b": {"a": {}}}'
    assert parse_json(text) == json.loads(text)


def test_messages_of_a_table_that_are_no_json_are_that_rows_error(tmp_path):
    pytest.importorskip("ray", reason="ray is not installed; it is in the extra ray")
    from phi4mm_jax.ray import inputs

    good = json.dumps([{"role": "user", "content": "hi"}])
    pq.write_table(pa.table({"messages": [good, "[{", f"[{TWICE}]"]}), tmp_path / "in.parquet")
    with (tmp_path / "in.parquet").open("rb") as file:
        rows = [json.loads(line)["messages"] for _, line in inputs._parquet_lines(file, inputs.Chunk("", "", 0, 0, 3))]
    assert rows == [json.loads(good), "[{", f"[{TWICE}]"]  # a string is an error where it is parsed


@pytest.mark.parametrize(("begun", "shown"), [(False, False), (True, True)])
def test_bar_of_work_that_was_not_begun(capsys, begun, shown):
    def fail():
        with progress_bar("Writing", size=True) as advance:
            if begun:
                advance(1, 2)
            raise InputError("no such run")

    with pytest.raises(InputError):
        fail()
    err = capsys.readouterr().err
    assert ("Writing" in err) == shown
    assert err.strip() or not err, "no empty line before an error"


@pytest.mark.parametrize(
    ("quantized", "words"), [(None, "Reading the weights"), ("int4", "Reading and quantising the")]
)
def test_bar_of_weights(capsys, quantized, words):
    with weights_bar("Reading", "the weights", quantized) as advance:
        advance(1000, 2000)
    err = capsys.readouterr().err
    assert words in err
    assert ("1.0/2.0 kB" in err) == (quantized is None), "a rate of bytes is not that of quantising"
