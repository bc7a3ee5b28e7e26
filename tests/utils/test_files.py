"""Files that are whole or not there; locks."""

from pathlib import Path

import pytest

from phi4mm_jax.utils.files import open_atomically, try_lock, write_atomically


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


def test_half_surrogates_are_escaped(tmp_path: Path):
    write_atomically(tmp_path / "a", "é\ud800")
    assert (tmp_path / "a").read_bytes() == b"\xc3\xa9\\ud800"


def test_a_lock_ends_with_its_file(tmp_path: Path):
    with (tmp_path / "lock").open("w") as first, (tmp_path / "lock").open("w") as second:
        assert try_lock(first)
        assert not try_lock(second)
        first.close()
        assert try_lock(second)
