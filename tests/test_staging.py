"""A destination is whole or not there: names that cannot be, what is in the way, and runs at the same time."""

import contextlib
import fcntl
import os
import shutil
from pathlib import Path

import pytest
from conftest import TINY

from phi4mm_jax import CheckpointError
from phi4mm_jax.checkpoint import staging
from phi4mm_jax.checkpoint.convert import to_orbax, to_torch
from phi4mm_jax.checkpoint.staging import staged


def write(destination: Path, content: str = "whole") -> list[str]:
    said = []
    with staged(destination, said.append) as folder:
        (folder / "file").write_text(content)
    return said


def killed(destination: Path) -> Path:
    """What a run that is killed leaves."""
    aside = staging.aside_of(destination)
    with contextlib.suppress(CheckpointError), staged(destination, print) as folder:
        (folder / "file").write_text("half")
        (folder / "folder").mkdir()
        folder.rename(f"{folder}-kept")
    Path(f"{aside}-kept").rename(aside)
    return aside


def test_leftovers_are_removed_and_said(tmp_path):
    killed(tmp_path / "destination")
    (said,) = write(tmp_path / "destination")
    assert "interrupted" in said
    assert [p.name for p in tmp_path.iterdir()] == ["destination"]
    assert [p.name for p in (tmp_path / "destination").iterdir()] == ["file"]
    staging.aside_of(tmp_path / "other").mkdir()  # killed before anything was written
    assert write(tmp_path / "other") == []


def test_files_are_on_the_disk_before_the_folder_has_its_name(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(staging.os, "fsync", lambda file: synced.append(os.readlink(f"/proc/self/fd/{file}")))
    with staged(tmp_path / "destination", print) as folder:
        (folder / "inner").mkdir()
        for name in ("file", "inner/file"):
            (folder / name).write_text("")
    assert sorted(synced) == [f"{tmp_path}/.destination.incomplete/{name}" for name in ("file", "inner/file")]


def test_what_others_have_there_is_kept(tmp_path):
    aside = tmp_path / ".destination.incomplete"
    aside.mkdir()
    (aside / "precious").write_text("mine")
    with pytest.raises(CheckpointError, match=r"\.destination\.incomplete: is in the way"):
        write(tmp_path / "destination")
    assert (aside / "precious").read_text() == "mine"


@pytest.mark.parametrize("inner", ["", "folder"])
def test_a_source_that_is_in_the_way(tmp_path, inner):
    aside = killed(tmp_path / "destination")
    for convert in (to_orbax, lambda a, b: to_torch(a, b, "native")):
        with pytest.raises(CheckpointError, match=r"is where .*destination would be written first"):
            convert(aside / inner, tmp_path / "destination")
    assert (aside / "file").read_text() == "half"


@pytest.mark.parametrize(
    ("destination", "named"),
    [
        ("link", "is a symbolic link"),
        ("dangling", "is a symbolic link"),
        ("new/..", "ends in '..'"),
        ("x" * 256, "cannot be written"),
        ("file", "exists already"),
        ("file/below", "cannot be written"),
        ("/", "exists already"),
    ],
)
def test_destinations_that_cannot_be(tmp_path, destination, named):
    """They are errors before the source is looked at, which here is none."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    for convert in (to_orbax, lambda a, b: to_torch(a, b, "native")):
        with pytest.raises(CheckpointError, match=named):
            convert(tmp_path / "nowhere at all", f"{tmp_path}/{destination}" if destination != "/" else "/")
    assert sorted(tmp_path.rglob("*")) == before


def test_parents_are_made_and_unmade(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        to_orbax(tmp_path / "nowhere", tmp_path / "a" / "b" / "c")
    assert not list(tmp_path.iterdir())
    write(tmp_path / "a" / "b" / "c")
    assert (tmp_path / "a" / "b" / "c" / "file").exists()


@pytest.mark.parametrize("other", ["finishes", "fails", "goes on"])
@pytest.mark.parametrize("leftover", [False, True])
def test_runs_at_the_same_time(tmp_path, monkeypatch, other, leftover):
    """Another run comes between a run's making of the folder and its lock on it."""
    destination, flock = tmp_path / "destination", fcntl.flock
    if leftover:
        killed(destination)
    with contextlib.ExitStack() as running:

        def late(descriptor, how):
            monkeypatch.setattr(staging.fcntl, "flock", flock)
            if other == "goes on":
                (running.enter_context(staged(destination, print)) / "file").write_text("other")
            elif other == "finishes":
                write(destination, "other")
            else:
                with contextlib.suppress(ZeroDivisionError), staged(destination, print):
                    raise ZeroDivisionError
            flock(descriptor, how)

        monkeypatch.setattr(staging.fcntl, "flock", late)
        with pytest.raises(CheckpointError, match="another process is writing it"):
            write(destination)
        assert destination.exists() == (other == "finishes")
    if other != "fails":
        assert (destination / "file").read_text() == "other"
        assert os.listdir(tmp_path) == ["destination"]


def test_a_destination_that_appears_meanwhile(tmp_path):
    precious = tmp_path / "destination" / "precious"
    with pytest.raises(CheckpointError, match="cannot be written"), staged(precious.parent, print):
        shutil.copytree(TINY / "speech-lora", precious)
    assert os.listdir(tmp_path) == ["destination"]
    assert len(os.listdir(precious)) == 2


def test_the_converters_hold_the_name_first(tmp_path):
    with (
        staged(tmp_path / "destination", print),
        pytest.raises(CheckpointError, match="another process is writing it"),
    ):
        to_orbax(TINY, tmp_path / "destination")
