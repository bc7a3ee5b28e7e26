"""Batches on many engines: answers of one, whatever is killed, every id once."""

import asyncio
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers.environment import ONE_DEVICE
from helpers.paths import FIXTURES, TINY

from infer import batch
from infer import ray as program
from phi4mm_jax import InputError
from phi4mm_jax.engine import EngineConfig, Request
from phi4mm_jax.engine.answer_file import AnswerFile
from phi4mm_jax.engine.jsonl import read_requests

pytest.importorskip("ray", reason="ray is not installed; it is in the extra ray")
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray.data._internal.object_extensions.arrow import ArrowPythonObjectArray
from ray.exceptions import ObjectLostError, RayTaskError

from phi4mm_jax.ray import Answer
from phi4mm_jax.ray.chips import restrict_to_chips
from phi4mm_jax.ray.inputs import index_file, key_of, read_chunk
from phi4mm_jax.ray.media import REQUEST, as_json, fetch_remote
from phi4mm_jax.ray.parts import Parts, index_part
from phi4mm_jax.ray.run import Engines, compact, index_files, place_engines
from phi4mm_jax.ray.storage import find_files
from phi4mm_jax.testing.ray_runs import answers_in, engine_processes

ROOT = Path(__file__).parents[2]
IMAGE, CLIP = TINY / "inputs" / "image_0.png", TINY / "inputs" / "audio_0.flac"
SIZES = {"slots": 3, "cache_tokens": 4096, "page_size": 64, "chunk": 256, "steps": 4}  # as in test_batch.py
DEFAULTS = {"max_new_tokens": 3}


def prompt(text: str, media: str = "") -> str:
    return f"<|user|>{media}{text}<|end|><|assistant|>"


def wanted(count: int, *but: int) -> np.ndarray:
    return np.array([i not in but for i in range(count)])


@pytest.fixture(scope="module")
def answer() -> Answer:
    return Answer(TINY, engine=SIZES, defaults=DEFAULTS, dtype="float32")


@pytest.fixture(scope="module")
def engine(tiny):
    return tiny.engine(EngineConfig(**SIZES))


def ask(answer: Answer, table: pa.Table) -> list[dict]:
    return asyncio.run(answer(table)).to_pylist()


# ---------------------------------------------------------------------------------------------- rows


@pytest.mark.slow
def test_rows_of_paths_and_bytes_are_answered_as_by_one_engine(answer, engine):
    table = pa.table(
        {
            "page": [7, 8, 9],  # the caller's own
            "prompt": [prompt("a"), prompt("read", "<|image_1|>"), prompt("hear", "<|audio_1|>")],
            "images": pa.array([None, [IMAGE.read_bytes()], None], pa.list_(pa.binary())),
            "audios": pa.array([None, None, [str(CLIP)]], pa.list_(pa.string())),
        }
    )
    found = ask(answer, table)
    asked = [
        Request(prompt("a"), max_new_tokens=3),
        Request(prompt("read", "<|image_1|>"), images=[IMAGE], max_new_tokens=3),
        Request(prompt("hear", "<|audio_1|>"), audios=[CLIP], max_new_tokens=3),
    ]
    expected = dict(engine.run(iter(asked)))
    assert [row["page"] for row in found] == [7, 8, 9]
    assert [row["tokens"] for row in found] == [expected[i].tokens for i in range(3)]
    assert [row["error"] for row in found] == [None] * 3
    assert not {"prompt", "images", "audios"} & found[0].keys()


def test_messages_in_columns_that_have_nulls(answer, engine):
    parts = pa.list_(pa.struct([("type", pa.string()), ("text", pa.string()), ("image", pa.binary())]))
    kind = pa.list_(pa.struct([("role", pa.string()), ("content", parts)]))
    content = [{"type": "image", "text": None, "image": IMAGE.read_bytes()}, {"type": "text", "text": "read"}]
    found = ask(answer, pa.table({"messages": pa.array([[{"role": "user", "content": content}]], kind)}))
    chat = [{"role": "user", "content": [{"type": "image", "image": str(IMAGE)}, {"type": "text", "text": "read"}]}]
    ((_, expected),) = engine.run(iter([Request(chat, max_new_tokens=3)]))
    assert found[0]["tokens"] == expected.tokens


def test_columns_of_a_request_are_the_keys_of_a_line():
    _, _, text = batch.__doc__.partition("is an object:")
    named = json.loads(text.partition('"messages"')[0])
    assert named.keys() | {"messages", "continue_final_message"} == REQUEST | {"id"}


def test_grammars_in_columns_are_obeyed(answer):
    """A struct has nulls for the kinds that a row does not have."""
    pytest.importorskip("llguidance")
    grammars = [{"regex": "[0-9]{2}"}, {"choice": ["left", "right"]}, None]
    digits, side, free = ask(
        answer, pa.table({"prompt": [prompt("x")] * 3, "grammar": grammars, "max_new_tokens": [20] * 3})
    )  # fmt: skip
    assert re.fullmatch("[0-9]{2}", digits["text"]), digits
    assert side["text"] in ("left", "right"), side
    assert free["error"] is None
    assert free["text"] not in (digits["text"], side["text"])


def test_a_bad_row_is_an_error_of_its_own(answer):
    table = pa.table(
        {
            "id": ["bad", "gone", "good"],
            "prompt": [prompt("x"), prompt("x", "<|image_1|>"), prompt("x")],
            "temperature": [-1.0, None, None],
            "images": [None, ["nowhere.png"], None],
        }
    )
    bad, gone, good = ask(answer, table)
    assert bad["id"] == "bad"
    assert "temperature" in bad["error"]
    assert "nowhere.png" in gone["error"]
    assert gone["tokens"] is None
    assert good["error"] is None
    assert len(good["tokens"]) == 3
    with pytest.raises(InputError, match='batch_format="pyarrow"'):
        asyncio.run(answer({"prompt": np.array(["x"])}))


def test_a_lost_reference_is_an_error_of_its_row(answer, monkeypatch):
    """A task that failed, and an object that is gone; the event loop reads no media for a digest."""
    failed = RayTaskError("make", "traceback\nmore", ValueError("no such page"))
    unmade, lost, good = (ray.ObjectRef(bytes([i]) * 28) for i in range(1, 4))

    def get(reference):
        if reference == good:
            return IMAGE.read_bytes()
        raise failed if reference == unmade else ObjectLostError(lost.hex(), None, "")

    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr("phi4mm_jax.engine.answer_lines.media_fingerprint", lambda _: pytest.fail("reads media"))
    media = ArrowPythonObjectArray.from_objects([[unmade], [lost], [good], [str(IMAGE)]])
    table = pa.table({"prompt": [prompt("x", "<|image_1|>")] * 4, "images": media})
    first, second, third, fourth = ask(answer, table)
    assert first["error"] == "image: its reference cannot be read (ValueError: no such page); put it again"
    assert second["error"].startswith("image: its reference cannot be read (ObjectLostError: ")
    assert third["error"] is None
    assert fourth["error"] is None
    assert len(third["tokens"]) == len(fourth["tokens"]) == 3


def test_batches_in_flight_share_the_slots(answer):
    """A batch that comes later is through before one that draws long: nobody waits for the first batch's end."""
    ended = []

    async def batches() -> None:
        async def one(name: str, tokens: int) -> None:
            await answer(pa.table({"prompt": [prompt(name)], "max_new_tokens": [tokens]}))
            ended.append(name)

        await asyncio.gather(one("long", 60), one("short", 2))

    asyncio.run(batches())
    assert ended == ["short", "long"]


def test_references_and_bytes_become_data_urls(monkeypatch):
    reference = ray.ObjectRef(b"r" * 28)
    monkeypatch.setattr(ray, "get", {reference: b"abc"}.get)
    stored = {"bytes": b"abc", "path": None}
    row = as_json({"images": [b"abc", reference, stored, {"bytes": None, "path": "a.png"}, "b.png"], "seed": None})
    assert row == {"images": ["data:image/unknown;base64,YWJj"] * 3 + ["a.png", "b.png"]}
    monkeypatch.setattr(ray, "get", {reference: 5}.get)
    with pytest.raises(InputError, match="holds a int"):
        as_json({"audios": [reference]})


def test_media_at_urls_are_fetched(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(b"abc")
    url = f"local://{path}"
    chat = [
        {"role": "user", "content": [{"type": "image", "image": url}, {"type": "image_url", "image_url": {"url": url}}]}
    ]
    assert fetch_remote(Request("x", images=[url, "b.png"])).images == [b"abc", "b.png"]
    found = fetch_remote(Request(chat)).prompt[0]["content"]
    assert [found[0]["image"], found[1]["image_url"]["url"]] == [b"abc", b"abc"]
    with pytest.raises(InputError, match=r"gone\.png: cannot be read"):
        fetch_remote(Request("x", images=[f"{url[:-5]}gone.png"]))

    def refuse(*_, **__):
        raise RuntimeError("a library's own")

    monkeypatch.setattr("fsspec.implementations.local.LocalFileSystem.open", refuse)
    with pytest.raises(InputError, match=r"a\.png: cannot be read \(a library's own\)"):
        fetch_remote(Request("x", images=[url]))


# ---------------------------------------------------------------------------------------------- files


def test_files_of_a_glob(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "deep/c.jsonl", ".hidden.jsonl", "a.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert find_files(f"{tmp_path}/*.jsonl") == {n: f"{tmp_path}/{n}" for n in ("a.jsonl", "b.jsonl")}
    assert find_files(f"local://{tmp_path}/**/*.jsonl").keys() == {"a.jsonl", "b.jsonl", "deep/c.jsonl"}
    assert find_files(f"file://{tmp_path}").keys() == {"a.jsonl", "b.jsonl", "deep/c.jsonl", "a.txt"}
    with pytest.raises(InputError, match="no such file"):
        find_files(f"{tmp_path}/*.parquet")


def test_lines_of_chunks_are_those_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr("phi4mm_jax.ray.inputs._CHUNK_LINES", 2)
    lines = ['\ufeff{"prompt": "a"}', "", '{"prompt": "b", "id": 7}', "  ", "no JSON", '{"prompt": "d", "id": "7"}']
    (tmp_path / "in.jsonl").write_text("\n".join(lines), newline="")
    index = index_file("in.jsonl", str(tmp_path / "in.jsonl"), DEFAULTS)
    assert index.keys.tolist() == [key_of(name) for name in ("in.jsonl:0", 7, "in.jsonl:4", "7")]
    assert index.broken.tolist() == [False, False, True, False]
    assert [(c.number, c.lines) for c in index.chunks] == [(0, 2), (3, 2)]
    read = [row for chunk in index.chunks for row in read_chunk(chunk, wanted(2, 0)).to_pylist()]
    assert [(row["number"], row["line"].strip()) for row in read] == [(2, lines[2].encode()), (5, lines[5].encode())]


def test_rows_of_parquet_are_lines(tmp_path):
    path = tmp_path / "in.parquet"
    table = pa.table({"id": [5, 6, 7], "prompt": ["a", "b", "c"], "images": [[b"abc"], [], None]})
    pq.write_table(table, path, row_group_size=2)
    index = index_file("in.parquet", str(path), DEFAULTS)
    assert index.keys.tolist() == [key_of(i) for i in (5, 6, 7)]
    rows = [row for chunk in index.chunks for row in read_chunk(chunk, wanted(chunk.lines)).to_pylist()]
    assert [json.loads(row["line"]) for row in rows] == [
        {"id": 5, "prompt": "a", "images": ["data:image/unknown;base64,YWJj"]},
        {"id": 6, "prompt": "b", "images": []},
        {"id": 7, "prompt": "c"},
    ]
    grammars = ['{"choice": ["a", "b"]}', "no JSON", None]
    pq.write_table(pa.table({"prompt": ["a"] * 3, "messages": ["[1]"] * 3, "grammar": grammars}), path)
    index = index_file("in.parquet", str(path), DEFAULTS)
    rows = [json.loads(row["line"]) for row in read_chunk(index.chunks[0], wanted(3)).to_pylist()]
    assert [row["messages"] for row in rows] == [[1]] * 3
    assert [row.get("grammar") for row in rows] == [{"choice": ["a", "b"]}, "no JSON", None]
    pq.write_table(table.append_column("page", pa.array([1, 2, 3])), path)
    with pytest.raises(InputError, match="column 'page' is not known"):
        index_file("in.parquet", str(path), DEFAULTS)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["1", "2"], None),
        (["1", '"1"'], "its ids are strings and whole numbers, which no column holds"),
        (["1", "9223372036854775808"], "its ids are numbers beyond 64 bits and whole numbers"),
        (['"\\ud800"'], "its ids are halves of surrogate pairs"),
    ],
)
def test_ids_of_parquet_are_of_one_kind(tmp_path, ids, message, monkeypatch):
    monkeypatch.setattr("phi4mm_jax.ray.run._gather", lambda function, given: [function(*g) for g in given])
    path = tmp_path / "in.jsonl"
    path.write_text("".join(f'{{"id": {name}, "prompt": "x"}}\n' for name in ids))
    assert len(index_files(str(path), DEFAULTS, parquet=False).keys) == len(ids)
    with pytest.raises(InputError, match=message) if message else contextlib.nullcontext():
        index_files(str(path), DEFAULTS, parquet=True)


def test_ids_that_are_there_twice_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("phi4mm_jax.ray.run._gather", lambda function, given: [function(*g) for g in given])
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text('{"prompt": "x"}\n{"id": "same", "prompt": "x"}\n')
    with pytest.raises(InputError, match=r"a\.jsonl line 2 and .*b\.jsonl line 2 have the same id"):
        index_files(str(tmp_path / "*.jsonl"), DEFAULTS, parquet=False)


@pytest.mark.parametrize("parquet", [False, True], ids=["jsonl", "parquet"])
@pytest.mark.parametrize("scheme", ["", "local://"], ids=["path", "url"])
def test_parts_are_written_whole_and_read_back(tmp_path, parquet, scheme):
    url = f"{scheme}{tmp_path}/out"
    answers = [{"id": "a", "request": "00ff", "text": "é", "tokens": [1, 2]}, {"id": "b", "request": "1", "error": "e"}]
    for answer in answers:
        parts = Parts(url, parquet=parquet, seconds=1000)
        parts.add([json.dumps(answer).encode()], errors=0)
        assert len(parts.paths) == answers.index(answer)  # it waits for others
        parts.flush()
        del parts  # another may write the folder
    parts = Parts(url, parquet=parquet)
    suffix = "parquet" if parquet else "jsonl"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [f"part-00000{i}.{suffix}" for i in range(2)]
    found = [index_part(path, parts.storage, "plain") for path in parts.paths]
    assert [(r.keys.tolist(), r.digests.tolist(), r.failed.tolist()) for r in found] == [
        ([key_of("a")], [0xFF], [False]),
        ([key_of("b")], [1], [True]),
    ]
    del parts
    with pytest.raises(InputError, match="give that --output-format"):
        Parts(url, parquet=not parquet)
    (tmp_path / "out" / "mine.txt").write_text("x")
    with pytest.raises(InputError, match=r"mine\.txt"):
        Parts(url, parquet=parquet)


def test_parts_are_numbered_behind_the_last(tmp_path):
    """Also where earlier ones are gone, and where the number has another digit."""
    folder = tmp_path / "out"
    folder.mkdir()
    names = ["part-999999.jsonl", "part-1000000.jsonl"]
    for name in names:
        (folder / name).write_text('{"id": 1}\n')
    parts = Parts(str(folder))
    parts.add([b'{"id": 2}'], errors=0)
    parts.flush()
    assert [Path(path).name for path in parts.paths] == [*names, "part-1000001.jsonl"]


def wait_until(what: Callable[[], bool], seconds: float = 60):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.01)


def test_answers_are_written_though_no_other_comes(tmp_path):
    parts = Parts(str(tmp_path / "out"), seconds=0.05)
    for count in (1, 2):
        parts.add([b'{"id": 0}'], errors=0)
        wait_until(lambda wanted=count: len(parts.paths) == wanted)
    parts.flush()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["part-000000.jsonl", "part-000001.jsonl"]


def test_answers_that_cannot_be_written_in_time_stop_the_run(tmp_path, monkeypatch):
    """At the next ones or at the end, where what can be written by then is."""
    calls = []

    def refuse(*_):
        calls.append(None)
        raise OSError(28, "No space left on device")

    parts = Parts(str(tmp_path / "out"), seconds=0.05)
    with monkeypatch.context() as full:
        full.setattr("phi4mm_jax.ray.parts.write_whole", refuse)
        parts.add([b'{"id": 0}'], errors=0)
        wait_until(lambda: len(calls) == 1)
        with pytest.raises(InputError, match="cannot be written \\(No space left on device\\)"):
            parts.add([b'{"id": 1}'], errors=0)
        with pytest.raises(InputError, match="cannot be written"):
            parts.flush()
    parts.flush()
    (written,) = parts.paths
    assert Path(written).read_text() == '{"id": 0}\n{"id": 1}\n'


def test_one_run_writes_a_folder(tmp_path):
    first = Parts(str(tmp_path / "out"))
    first.add([b'{"id": 0}'], errors=0)  # which waits
    with pytest.raises(InputError, match="another run is writing it"):
        Parts(str(tmp_path / "out"))
    del first
    Parts(str(tmp_path / "out"))


@pytest.mark.parametrize("parquet", [False, True], ids=["jsonl", "parquet"])
def test_one_answer_of_each_line_is_kept(tmp_path, parquet, monkeypatch):
    """An error gives way to an answer, and an error to a later one; what is of no line stays."""
    monkeypatch.setattr("phi4mm_jax.ray.run._gather", lambda function, given: [function(*g) for g in given])
    (tmp_path / "in.jsonl").write_text("".join(f'{{"id": "{name}", "prompt": "x"}}\n' for name in "abcd"))
    inputs = index_files(str(tmp_path / "in.jsonl"), DEFAULTS, parquet)
    digests = dict(zip("abcd", (f"{digest:016x}" for digest in inputs.digests.tolist()), strict=True))

    def line(name: str, **found) -> bytes:
        return json.dumps({"id": name, "request": digests.get(name, "1"), **found}).encode()

    lost = [f"lost {i}" for i in range(8)]
    told = (
        [("a", "error"), ("b", "text"), ("c", "error"), *((name, "text") for name in lost)],
        [("a", "text"), ("c", "error"), ("gone", "text")],
        [("d", "error"), ("a", "error")],
    )
    parts = Parts(str(tmp_path / "out"), parquet=parquet)
    for number, part in enumerate(told):
        parts.add([line(n, **{k: f"{number}"}, **({} if k == "error" else {"tokens": [number]})) for n, k in part], 0)
        parts.flush()
    failed, done, cut = compact(parts, inputs, "plain")
    assert (failed.tolist(), done.tolist()) == ([False, False, True, True], [True, True, False, False])
    assert not cut.any()
    found = [index_part(path, parts.storage, "plain") for path in parts.paths]
    kept = ("b", *lost), ("a", "c", "gone"), ("d",)
    assert [r.keys.tolist() for r in found] == [[key_of(n) for n in names] for names in kept]
    parts.add([line("d", text="3", tokens=[3], finish_reason="length"), line("b", error="3")], 0)
    parts.flush()
    failed, done, cut = compact(parts, inputs, "plain")
    assert cut.tolist() == [False, False, False, True]
    assert (failed.tolist(), done.tolist()) == ([False, False, True, False], [True, True, False, True])
    counts = [len(index_part(path, parts.storage, "plain").keys) for path in parts.paths]
    assert counts == [9, 3, 1]  # a part without answers is gone
    digests["b"] = "2"
    parts.add([line("b", text="4", tokens=[4])], 0)
    parts.flush()
    with pytest.raises(InputError, match=r"has an answer to another request than .*in\.jsonl line 2 is now"):
        compact(parts, inputs, "plain")


# ---------------------------------------------------------------------------------------------- chips


@pytest.mark.parametrize(
    ("chips", "bounds"), [([3], "1,1,1"), ([2, 3], "1,2,1"), ([4, 5, 6, 7], "2,2,1"), ([*range(8)], "2,4,1")]
)
def test_an_engine_sees_its_own_chips(chips, bounds):
    environment = {"TPU_HOST_BOUNDS": "2,2,1", "TPU_WORKER_HOSTNAMES": "10.0.0.1,10.0.0.2", "TPU_WORKER_ID": "1"}
    restrict_to_chips(chips, environment)
    assert environment["TPU_VISIBLE_CHIPS"] == ",".join(map(str, chips))
    assert environment["TPU_CHIPS_PER_PROCESS_BOUNDS"] == bounds
    assert environment["TPU_PROCESS_BOUNDS"] == "1,1,1"
    assert environment["TPU_WORKER_HOSTNAMES"] == "localhost"
    assert environment["TPU_PROCESS_PORT"] == str(8476 + chips[0])
    assert "TPU_HOST_BOUNDS" not in environment
    with pytest.raises(InputError, match="3 TPU chips"):
        restrict_to_chips([0, 1, 2], environment)


@pytest.mark.parametrize(
    ("hosts", "asked", "engines"),
    [
        ([{"TPU": 4.0, "CPU": 96.0}] * 2, (None, None), (8, "TPU", 1)),
        ([{"TPU": 4.0}, {"TPU": 4.0}, {"CPU": 8.0}], (None, 4), (2, "TPU", 4)),
        ([{"GPU": 3.0}], (None, 2), (1, "GPU", 2)),
        ([{"CPU": 3.0}], (2, None), (2, "CPU", 1)),
        ([{"CPU": 9.0}], (None, None), (1, "CPU", 8)),
    ],
)
def test_engines_are_placed_within_hosts(hosts, asked, engines, monkeypatch):
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": host} for host in hosts])
    assert place_engines(*asked) == Engines(*engines)


def test_an_engine_does_not_span_hosts(monkeypatch):
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": i < 2, "Resources": {"TPU": 4.0}} for i in range(3)])
    with pytest.raises(InputError, match="room for 0 engines of 8 TPU each"):
        place_engines(None, 8)
    with pytest.raises(InputError, match="room for 8 engines of 1 TPU each, and 9"):
        place_engines(9, None)


# ---------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--write-seconds", "-1", "--write-seconds is -1; expected 0 or more seconds"),
        ("--write-seconds", "nan", "--write-seconds is nan; expected 0 or more seconds"),
        ("--engines", "0", "--engines is 0; expected a positive whole number"),
    ],
)
def test_options_are_checked_first(tmp_path, option, value, message, monkeypatch, capsys):
    given = ["--model", str(TINY), "--input", "in", "--output", str(tmp_path / "out"), f"{option}={value}"]
    monkeypatch.setattr(sys, "argv", ["ray", *given])
    assert program.main() == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def write_mixed_rows(folder: Path, count: int) -> Path:
    """Write two files of texts, images, clips and both, in turn."""
    held = FIXTURES / "held"
    kinds = [(kind, (held / f"{kind}.jsonl").read_text().splitlines()) for kind in ("text", "ocr", "speech", "asked")]
    lines = []
    for number in range(count):
        kind, samples = kinds[number % 4]
        (message, *_) = json.loads(samples[number // 4])["messages"]
        for part in message["content"]:
            part.update({key: str(held / part[key]) for key in ("image", "audio") if key in part})
        lines.append(json.dumps({"id": f"{kind}-{number}", "messages": [message], "max_new_tokens": 4 + number % 9}))
    folder.mkdir()
    (folder / "a.jsonl").write_text("\n".join(lines[: count // 3]))
    (folder / "b.jsonl").write_text("\n".join(lines[count // 3 :]))
    (folder / "all.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen]]:
    """Return a function that starts a run; those that are left are killed."""
    environment = os.environ | {"XLA_FLAGS": ONE_DEVICE, "RAY_worker_niceness": "0"}  # not behind the other tests

    def begin(source: str, output: Path, *more: str) -> subprocess.Popen:
        command = [
            sys.executable, "-m", "infer.ray", "--model", str(TINY), "--input", source, "--output", str(output),
            "--cluster", "local", "--engines", "2", "--dtype", "float32", "--cache-tokens", "4096", "--slots", "3",
            *more,
        ]  # fmt: skip
        run = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        left.enter_context(run)
        left.callback(run.kill)
        return run

    with contextlib.ExitStack() as left:
        yield begin


def wait_for(what, run: subprocess.Popen, seconds: float = 300):
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "it takes too long"
        assert run.poll() is None, run.stderr.read()
        time.sleep(0.2)
    return found


@pytest.mark.slow
@pytest.mark.subprocess
def test_killed_engines_and_runs_answer_every_id_once(tmp_path, engine, start):
    """One engine is killed, then the run, then the run is resumed and its engines are killed while they hold lines."""
    folder, output, draw = write_mixed_rows(tmp_path / "in", 80), tmp_path / "out", random.Random(0)
    (folder / "c.jsonl").write_text('{"id": "broken", "prompt": 3}\nno JSON\n')
    source = f"{folder}/*.jsonl"
    run = start(source, output, "--write-seconds", "0")
    os.kill(draw.choice(wait_for(lambda: engine_processes(run.pid), run)), signal.SIGKILL)
    wait_for(lambda: len(answers_in(output)) > 10, run)
    run.kill()
    run.wait()
    answered = len(answers_in(output))
    assert 10 < answered < 82
    run = start(source, output, "--write-seconds", "0")
    killed = wait_for(lambda: engine_processes(run.pid, at_work=True), run)  # not yet compiled, so none has answered
    for process in killed:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    _, stderr = run.communicate(timeout=600)
    assert run.returncode == 1, stderr  # two lines have failed
    assert f"{answered} of 82 lines are answered already" in stderr
    restarts = re.findall(r"an engine has died and is started again, (\d+) so far", stderr)
    assert restarts, stderr
    assert 1 <= int(restarts[-1]) <= len(killed)
    assert "Deprecat" not in stderr
    found = answers_in(output)
    assert sorted(p.name for p in output.iterdir() if not p.name.startswith("part-")) == ["settings.json"]
    lines = read_requests(folder / "all.txt", max_new_tokens=256)
    with AnswerFile(tmp_path / "one", lines) as one:
        list(one.run(engine))
    expected = {a["id"]: a for a in map(json.loads, (tmp_path / "one").read_text().splitlines())}
    assert sorted(a["id"] for a in found) == sorted([*expected, "broken", "c.jsonl:1"])
    assert {a["id"]: a for a in found if "error" not in a} == expected
    assert {a["id"] for a in found if "error" in a} == {"broken", "c.jsonl:1"}
    refused = start(source, output, "--max-new-tokens", "7")
    assert "its answers are of another max_new_tokens" in refused.communicate(timeout=300)[1]
    assert refused.returncode == 2
