"""Files that are whole or not there; locks."""

import os
from pathlib import Path

import pytest

from phi4mm_jax import CheckpointError, InputError
from phi4mm_jax.checkpoint.staging import staged
from phi4mm_jax.evaluation.answers import claim_folder
from phi4mm_jax.serve.files import Store
from phi4mm_jax.serve.limits import Limits
from phi4mm_jax.training.run_folder import check_folder, exclusive_lock
from phi4mm_jax.utils.files import (
    check_parent,
    incomplete_path,
    make_folder,
    open_atomically,
    try_lock,
    write_atomically,
)
from phi4mm_jax.utils.profiling import Profile


def test_a_failed_write_leaves_the_former_file(tmp_path: Path):
    path = tmp_path / "a.json"
    write_atomically(path, "former")
    with pytest.raises(UnicodeEncodeError), open_atomically(path) as file:
        file.write("half\ud800")
    assert path.read_text() == "former"
    with open_atomically(path) as file:
        file.write("whole")
        assert path.read_text() == "former"
    assert path.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch):
    done, path = [], tmp_path / "a"

    def note(name: str) -> None:
        function = getattr(os, name)

        def noted(*arguments):
            done.append((name, incomplete_path(path).read_text()))
            return function(*arguments)

        monkeypatch.setattr(os, name, noted)

    note("fsync")
    note("replace")
    write_atomically(path, "whole")
    assert done == [("fsync", "whole"), ("replace", "whole")]
    assert path.read_text() == "whole"


def enter(context) -> None:
    with context:
        pass


@pytest.mark.parametrize(
    "make",
    [
        make_folder,
        check_folder,
        lambda path: enter(exclusive_lock(path)),
        lambda path: enter(staged(path)),
        lambda path: enter(Profile(path)),
        lambda path: claim_folder(path, Limits()),
        lambda path: Store(path, Limits()),
    ],
    ids=["folder", "before a run", "run", "checkpoint", "profile", "evaluation", "files of a server"],
)
def test_an_output_makes_one_folder_above_it_at_most(tmp_path: Path, make):
    for missing, path in (("a", tmp_path / "a" / "b" / "out"), ("nope", Path("/nope-phi4mm/out"))):
        message = rf"^{path}: there is no folder .*/{missing}.*; make it first"
        with pytest.raises((InputError, CheckpointError), match=message):
            make(path)
    assert not list(tmp_path.iterdir())
    assert not Path("/nope-phi4mm").exists()


def test_an_output_may_be_in_a_new_folder(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in (Path("out"), Path("new/out"), tmp_path / "other" / "out"):
        check_parent(path)
        make_folder(path)
        assert path.is_dir()


def test_half_surrogates_are_escaped(tmp_path: Path):
    write_atomically(tmp_path / "a", "é\ud800")
    assert (tmp_path / "a").read_bytes() == b"\xc3\xa9\\ud800"


def test_a_lock_ends_with_its_file(tmp_path: Path):
    with (tmp_path / "lock").open("w") as first, (tmp_path / "lock").open("w") as second:
        assert try_lock(first)
        assert not try_lock(second)
        first.close()
        assert try_lock(second)
