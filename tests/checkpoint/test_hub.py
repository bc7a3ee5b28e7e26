"""Folders and names of repositories, against a server on this machine that speaks what is used of the Hub's API."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from helpers.paths import TINY
from huggingface_hub import constants

import phi4mm_jax
from convert import record
from phi4mm_jax import CheckpointError
from phi4mm_jax.checkpoint.hub import local_folder

COMMITS = {"main": "a" * 40, "refs/pr/70": "b" * 40}
SHARD = "model-00001-of-00003.safetensors"
NOT_NEEDED = {"inputs/image_0.png", "figures/chart.png", "pytorch_model.bin", ".gitattributes"}


class Hub(ThreadingHTTPServer):
    """Serves `files` as org/tiny; org/gated asks for consent; there is nothing else.

    Attributes:
        asked: method, path and range of each request.
        failing: "once": the connection breaks off in the middle of a shard; "down": and the server fails from then on.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.asked: list[tuple[str, str, str | None]] = []
        self.failing: Literal[None, "once", "down"] = None
        inner = ("config.json", "generation_config.json", "preprocessor_config.json", "model.safetensors.index.json")
        names = [*inner, "tokenizer.json", "tokenizer_config.json", *(p.name for p in TINY.glob("model-*.safetensors"))]
        names += [
            f"{kind}-lora/{n}"
            for kind in ("vision", "speech")
            for n in ("adapter_config.json", "adapter_model.safetensors")
        ]
        self.files = {name: (TINY / name).read_bytes() for name in names}
        self.files |= {"LICENSE": b"MIT", "README.md": b"# Tiny", "modeling_phi4mm.py": b"raise RuntimeError"}
        self.files |= dict.fromkeys(NOT_NEEDED, b"0")

    def fetched(self) -> list[str]:
        return [path for method, path, _ in self.asked if method == "GET" and "/resolve/" in path]


class Handler(BaseHTTPRequestHandler):
    server: Hub  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append((self.command, path, self.headers.get("Range")))
        api, is_api = path.removeprefix("/api/models/"), path.startswith("/api/models/")
        if "org/gated" in path:
            self.answer(403, b"", {"X-Error-Code": "GatedRepo"})
        elif is_api and api.startswith("org/tiny/revision/") and (name := api.split("/revision/")[1]) in COMMITS:
            self.answer(200, json.dumps({"id": "org/tiny", "sha": COMMITS[name]}).encode())
        elif is_api and api.startswith("org/tiny/tree/"):
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in self.server.files.items()
            ]
            self.answer(200, json.dumps(tree).encode())
        elif is_api and api.startswith("org/tiny/"):
            self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif path.startswith("/org/tiny/resolve/"):
            commit, _, name = path.removeprefix("/org/tiny/resolve/").partition("/")
            self.send_file(commit, name)
        else:
            self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})

    def send_file(self, commit: str, name: str):
        content = self.server.files[name]
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        if self.server.failing and name == SHARD and self.command == "GET":
            if self.server.failing == "once":
                self.server.failing = None
            if start:
                self.answer(500, b"")
            else:
                self.answer(200, content, headers, sent=len(content) // 2)
                self.close_connection = True
        elif start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self.answer(206, content[start:], headers)
        else:
            self.answer(200, content, headers)

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None, sent: int | None = None):
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:sent])

    def log_message(self, format, *args):
        pass


def connect(monkeypatch, url: str) -> None:
    """What HF_ENDPOINT does when huggingface_hub is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    server = Hub()
    connect(monkeypatch, server.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)  # what is written at a time
    monkeypatch.chdir(tmp_path)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_is_itself(hub, tmp_path):
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    for path in ("org/tiny", str(tmp_path), tmp_path, Path("org")):
        assert local_folder(path) == Path(path)
    assert hub.asked == []


PATHS = (
    "./org/tiny",
    "a/org/tiny",
    "~/tiny",
    "/org/tiny",
    "../tiny",
    "org/tiny/",
    "tiny",
    "",
    "org//tiny",
    "org/.tiny",
)


@pytest.mark.parametrize("path", [*PATHS, "org/tiny@", "org\\tiny", "org/tiny@a b", Path("org/tiny")])
def test_other_paths_are_never_looked_for_on_the_hub(hub, path):
    with pytest.raises(CheckpointError, match=r"no such folder|is not a path"):
        local_folder(path)
    assert hub.asked == []


def test_a_file_is_no_folder(hub, tmp_path):
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "tiny").write_text("")
    with pytest.raises(CheckpointError, match="org/tiny: is a file"):
        local_folder("org/tiny")
    assert hub.asked == []


def test_download(hub, capfd, tiny):
    folder = local_folder("org/tiny")
    assert names(folder) == hub.files.keys() - NOT_NEEDED
    assert all((folder / name).read_bytes() == hub.files[name] for name in names(folder))
    assert not any(name in path for path in hub.fetched() for name in NOT_NEEDED)
    bars = capfd.readouterr().err
    assert f"Fetching {len(names(folder))} files" in bars
    assert "100%" in bars
    model = phi4mm_jax.load(folder, dtype="float32")
    embedding = [m.variables["params"]["decoder"]["embedding"] for m in (model, tiny)]
    assert np.array_equal(*embedding)

    before = len(hub.fetched())
    assert local_folder("org/tiny") == folder
    assert len(hub.fetched()) == before


def test_the_recorder_downloads(hub, tmp_path, capsys):
    assert record.main(["--model", "org/tiny", "--out", str(tmp_path / "goldens"), "--prompt", "Hello"]) == 2
    assert "is in the original layout" in capsys.readouterr().err


def test_revision(hub):
    assert local_folder("org/tiny@refs/pr/70").name == COMMITS["refs/pr/70"]
    with pytest.raises(CheckpointError, match=r"(?s)org/tiny@v2: neither.*no revision 'v2'"):
        local_folder("org/tiny@v2")


def test_no_such_repository(hub):
    with pytest.raises(CheckpointError, match=r"(?s)org/tyni: neither a folder here nor .*spelling.*HF_TOKEN.*404"):
        local_folder("org/tyni")


@pytest.mark.parametrize("is_reached", [True, False])
def test_a_mistyped_path_beside_others_is_taken_for_a_path(hub, tmp_path, monkeypatch, is_reached):
    (tmp_path / "assets" / "tiny").mkdir(parents=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", not is_reached)
    cause = "RepositoryNotFoundError" if is_reached else "LocalEntryNotFoundError"
    with pytest.raises(CheckpointError) as raised:
        local_folder("assets/tinny")
    told = "assets/tinny: no such folder; in assets there are tiny. If a repository on the Hub was meant, it was not"
    assert str(raised.value).startswith(f"{told} downloaded ({cause}); ")
    assert "internet" not in str(raised.value)


def test_gated_repository(hub):
    with pytest.raises(CheckpointError, match=r"(?s)org/gated: neither.*accept its terms.*HF_TOKEN.*403"):
        local_folder("org/gated")


def test_refused_connection(hub, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.server_close()  # nothing listens at its port any more
    connect(monkeypatch, f"http://127.0.0.1:{server.server_address[1]}")
    with pytest.raises(CheckpointError, match=r"(?s)org/tiny: neither.*check the connection.*refused"):
        local_folder("org/tiny")
    connect(monkeypatch, hub.url)
    folder = local_folder("org/tiny")
    connect(monkeypatch, f"http://127.0.0.1:{server.server_address[1]}")
    assert local_folder("org/tiny") == folder  # what is in the cache is whole


def test_offline(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"org/tiny: neither.*unset HF_HUB_OFFLINE"):
        local_folder("org/tiny")
    assert hub.asked == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    folder = local_folder("org/tiny")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.asked.clear()
    assert local_folder("org/tiny") == folder
    assert hub.asked == []


def test_a_broken_connection_is_taken_up_where_it_broke(hub):
    hub.failing = "once"
    assert (local_folder("org/tiny") / SHARD).read_bytes() == hub.files[SHARD]
    first, second = [r for method, path, r in hub.asked if method == "GET" and path.endswith(SHARD)]
    half = len(hub.files[SHARD]) // 2
    assert first is None
    assert half - constants.DOWNLOAD_CHUNK_SIZE <= int(second.removeprefix("bytes=").rstrip("-")) <= half


def test_an_interrupted_download_goes_on(hub, monkeypatch):
    hub.failing = "down"
    with pytest.raises(CheckpointError, match=r"(?s)org/tiny: neither.*run again: files that were whole are kept.*500"):
        local_folder("org/tiny")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"IncompleteSnapshotError.*1 file\(s\) are missing"):
        local_folder("org/tiny")  # what is there is no checkpoint
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.failing = None
    hub.asked.clear()
    folder = local_folder("org/tiny")
    assert {path.rpartition("/")[2] for path in hub.fetched()} == {SHARD}
    assert names(folder) == hub.files.keys() - NOT_NEEDED
    assert all((folder / name).read_bytes() == hub.files[name] for name in names(folder))
