"""Paths as users write them, and what is said of those that cannot be used."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.paths import TINY

import phi4mm_jax
from phi4mm_jax.checkpoint.convert import to_torch
from phi4mm_jax.checkpoint.hub import local_folder
from phi4mm_jax.data.manifests import open_manifest
from phi4mm_jax.errors import CheckpointError, InputError
from phi4mm_jax.testing.goldens import read_goldens
from phi4mm_jax.training.export import export
from phi4mm_jax.training.recipe import load_recipe
from phi4mm_jax.utils.paths import local_path

ROOT = Path(__file__).parents[2]
URLS = [
    ("gs://bucket/model", "gcloud storage cp -r gs://bucket/model FOLDER"),
    ("s3://bucket/model", "aws s3 cp --recursive s3://bucket/model FOLDER"),
    ("hf://org/name/sub", "as org/name: org/name"),
    ("file:///data/model", "give /data/model"),
    ("https://a.b/model", "download https://a.b/model FOLDER"),
]


@pytest.mark.parametrize(("url", "remedy"), URLS)
@pytest.mark.parametrize("form", [str, Path])
def test_urls_are_named_with_a_remedy(url, remedy, form):
    with pytest.raises(InputError) as caught:
        local_path(form(url))
    assert "is a URL" in str(caught.value)
    assert remedy in str(caught.value)


@pytest.mark.parametrize(
    ("given", "named"), [("", "''"), ("  ", "'  '"), ("a\0b", r"'a\x00b'"), ("a" * 300, "too long")]
)
def test_what_no_file_can_be_called(given, named):
    with pytest.raises(InputError, match="is not a path") as caught:
        local_path(given)
    assert named in str(caught.value)


def test_a_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_path("~/a b") == tmp_path / "a b"
    with pytest.raises(InputError, match="~nobody-at-all is nobody's home folder"):
        local_path("~nobody-at-all/x")


@pytest.mark.parametrize("name", ["a b", "übergröße", "~", "gs:", "trailing/", "a:b", "C:"])
def test_odd_names_of_files_that_are_there(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir()
    Path(name, "x").touch()
    assert local_path(f"{name}/x").absolute() == tmp_path / name / "x"


@pytest.mark.parametrize("given", ["gs://bucket/x", ""])
@pytest.mark.parametrize(
    "use",
    [
        phi4mm_jax.load, local_folder, read_goldens, open_manifest, load_recipe,
        lambda path: to_torch(path, "/nowhere/x", "original"), lambda path: to_torch(TINY, path, "original"),
        lambda path: export(path, "/nowhere/x", "original"),
    ],
)  # fmt: skip
def test_every_reader_and_writer_says_so(use, given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((InputError, CheckpointError), match=r"is a URL, and only files|'' is not a path"):
        use(given)
    assert not any(tmp_path.iterdir())


@pytest.mark.subprocess
@pytest.mark.parametrize(
    ("output", "named"),
    [
        ("", "'' is not a path"),
        ("gs://b/out.jsonl", "is a URL"),
        ("missing/out.jsonl", "missing/out.jsonl"),
        (".", "Is a dir"),
    ],
)
def test_outputs_of_a_batch(output, named, tmp_path):
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": "Hi"}))
    code = f"import sys, os; sys.path.insert(0, {str(ROOT)!r}); from infer.batch import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "--model", str(TINY), "--input", "in.jsonl", "--output", output]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 2
    assert "Traceback" not in run.stderr
    assert named in run.stderr.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_file_where_a_folder_is_wanted(tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(CheckpointError, match="is a file; give the folder"):
        local_folder(str(file))
    with pytest.raises(CheckpointError, match="cannot be written"):
        to_torch(TINY, file / "x", "original")
    assert file.read_text() == ""
