"""A destination is whole or not there: names that cannot be, what is in the way, and runs at the same time."""

import contextlib
import errno
import fcntl
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.paths import TINY

from phi4mm_jax import CheckpointError
from phi4mm_jax.checkpoint import staging
from phi4mm_jax.checkpoint.convert import to_orbax, to_torch
from phi4mm_jax.checkpoint.staging import staged
from phi4mm_jax.utils.files import incomplete_path


def write(destination: Path, content: str = "whole") -> None:
    with staged(destination) as folder:
        (folder / "file").write_text(content)


def killed(destination: Path) -> Path:
    """What a run that is killed leaves."""
    aside = incomplete_path(destination)
    with contextlib.suppress(CheckpointError), staged(destination) as folder:
        (folder / "file").write_text("half")
        (folder / "folder").mkdir()
        folder.rename(f"{folder}-kept")
    Path(f"{aside}-kept").rename(aside)
    return aside


def test_leftovers_are_removed_and_logged(tmp_path, caplog):
    killed(tmp_path / "destination")
    caplog.clear()
    write(tmp_path / "destination")
    (message,) = caplog.messages
    assert "interrupted" in message
    assert [p.name for p in tmp_path.iterdir()] == ["destination"]
    assert [p.name for p in (tmp_path / "destination").iterdir()] == ["file"]
    incomplete_path(tmp_path / "other").mkdir()  # killed before anything was written
    caplog.clear()
    write(tmp_path / "other")
    assert caplog.messages == []


def test_an_interruption_says_what_it_waits_for(tmp_path, caplog):
    with contextlib.suppress(KeyboardInterrupt), staged(tmp_path / "destination") as folder:
        (folder / "file").write_text("half")
        raise KeyboardInterrupt
    assert caplog.messages == [f"Interrupted; removing the unfinished files of {tmp_path / 'destination'}"]
    assert not list(tmp_path.iterdir())


def test_a_destination_that_is_made_meanwhile_is_known_before_any_work(tmp_path, monkeypatch):
    held = staging._held

    def held_late(aside, destination):
        destination.mkdir()
        (destination / "file").write_text("another run's")
        return held(aside, destination)

    monkeypatch.setattr(staging, "_held", held_late)
    with pytest.raises(CheckpointError, match="exists already"), staged(tmp_path / "out"):
        pytest.fail("the work has begun")
    assert (tmp_path / "out" / "file").read_text() == "another run's"


def test_files_are_on_the_disk_before_the_folder_has_its_name(tmp_path, monkeypatch):
    """And its name is, before the marker goes that says that it may be removed."""
    done = []

    def note(owner, name, path_of=str):
        function = getattr(owner, name)

        def noted(at, *args):
            done.append((name, os.path.relpath(path_of(at), tmp_path)))
            return function(at, *args)

        monkeypatch.setattr(owner, name, noted)

    with staged(tmp_path / "new" / "destination") as folder:
        (folder / "inner").mkdir()
        for name in ("file", "inner/file"):
            (folder / name).write_text("")
        note(staging.os, "fsync", lambda file: os.readlink(f"/proc/self/fd/{file}"))
        note(staging.os, "rename")
        note(staging.Path, "unlink")
    aside, marker = "new/.destination.incomplete", ".written-by-phi4mm-jax"
    files, folders = [f"{aside}/{marker}", f"{aside}/file", f"{aside}/inner/file"], [f"{aside}/inner", aside]
    assert sorted(done[:3]) == [("fsync", path) for path in sorted(files)]
    assert done[3:] == [
        *(("fsync", path) for path in folders),
        ("rename", aside),
        ("fsync", "new"),
        ("fsync", "."),
        ("unlink", f"new/destination/{marker}"),
        ("fsync", "new/destination"),
    ]


# Kills a run of `staged` at each of its lines in turn, and runs it again after each; prints what is wrong.
KILLS = """
import contextlib, logging, os, shutil, signal, sys
from pathlib import Path
from phi4mm_jax import CheckpointError
from phi4mm_jax.checkpoint import staging

FILES = ["file", "inner/file"]
READERS = ("_check_free", "_is_unfinished", "_sync", "<genexpr>")  # change nothing: a kill before them is one in them
logging.disable()  # it says each time that an earlier run was interrupted
os.fsync = lambda file: None  # slow, and nothing to a process that is killed

def write(destination):
    with staging.staged(destination) as folder:
        (folder / "inner").mkdir()
        for content in ("half", "whole"):
            for name in FILES:
                (folder / name).write_text(content)

def killed(destination, lines):
    # Whether the run was killed after so many lines: it may have fewer.
    child = os.fork()
    if not child:
        left = lines
        def trace(frame, event, argument):
            nonlocal left
            if frame.f_code.co_filename not in (staging.__file__, __file__) or frame.f_code.co_name in READERS:
                return None
            left -= event == "line"
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return trace
        sys.settrace(trace)
        write(destination)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])

def check(root, *what):
    # Nothing has the name, or all of it; and the same command ends well, unless it was through.
    destination = root / "destination"
    names = sorted(str(p.relative_to(destination)) for p in destination.rglob("*") if p.is_file())
    through = names == FILES
    if names and sorted({*names} - {staging._MARKER}) != FILES:
        print(*what, "a part has the name:", names)
    try:
        write(destination)
        refused = False
    except CheckpointError as error:
        refused = str(error)
    if bool(refused) != through or through and "exists already" not in refused:
        print(*what, "through:", through, "refused:", refused)
    left = sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())
    if left != [f"destination/{name}" for name in FILES] or len(os.listdir(root)) > 1:
        print(*what, left)
    if any((destination / name).read_text() != "whole" for name in FILES):
        print(*what, "is not whole")

def nothing(destination):
    pass

def half(destination):
    # What a run has left that was killed as it wrote.
    folder = destination.with_name(".destination.incomplete")
    folder.mkdir()
    (folder / staging._MARKER).touch()
    (folder / "file").write_text("half")
    (folder / "old").mkdir()

def renamed(destination):
    # What one has left that was killed as its folder had just been renamed.
    write(destination)
    (destination / staging._MARKER).touch()

root = Path(sys.argv[1])
for leftover in (nothing, half, renamed):
    lines, was_killed = 0, True
    while was_killed:
        root.mkdir()
        leftover(root / "destination")
        was_killed = killed(root / "destination", lines)
        check(root, leftover.__name__, lines)
        shutil.rmtree(root)
        lines += 1
    print(leftover.__name__, lines > 50)
"""


@pytest.mark.subprocess
def test_a_run_that_is_killed_anywhere_is_run_again(tmp_path):
    (tmp_path / "kills.py").write_text(KILLS)
    command = [sys.executable, tmp_path / "kills.py", tmp_path / "root"]
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": os.getcwd()})
    assert (ran.stdout, ran.stderr) == ("nothing True\nhalf True\nrenamed True\n", "")


@pytest.mark.parametrize(("step", "nth"), [("fsync", 0), ("fsync", 4), ("rename", 0), ("unlink", 0), ("fsync", 3)])
def test_an_error_at_the_end_leaves_nothing(tmp_path, monkeypatch, step, nth):
    """Also one after the folder was renamed, up to the last, its sync without the marker."""
    owner = staging.Path if step == "unlink" else staging.os
    function, calls = getattr(owner, step), []

    def failing(*args):
        calls.append(args)
        if len(calls) == nth + 1:
            raise OSError(errno.EIO, "broken")
        return function(*args)

    monkeypatch.setattr(owner, step, failing)
    with pytest.raises(CheckpointError, match=r"nothing was left there \(.*broken"):
        write(tmp_path / "destination")
    assert os.listdir(tmp_path) == []


def test_a_folder_that_somebody_has_used_is_kept(tmp_path):
    """The run that wrote it was killed with all but the marker done."""
    destination = tmp_path / "destination"
    write(destination)
    (destination / staging._MARKER).touch()
    time.sleep(0.02)  # more than a tick of a file system's clock
    (destination / "mine").write_text("mine")
    with pytest.raises(CheckpointError, match="exists already"):
        write(destination)
    assert (destination / "mine").read_text() == "mine"


def test_a_folder_that_another_run_has_just_renamed(tmp_path, monkeypatch):
    """It is at work until its marker has gone."""
    destination, unlink = tmp_path / "destination", Path.unlink

    def late(path, **options):
        monkeypatch.setattr(staging.Path, "unlink", unlink)
        with pytest.raises(CheckpointError, match="another process is writing it"):
            write(destination, "other")
        unlink(path, **options)

    monkeypatch.setattr(staging.Path, "unlink", late)
    write(destination)
    assert [os.listdir(tmp_path), os.listdir(destination)] == [["destination"], ["file"]]
    assert (destination / "file").read_text() == "whole"


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


def test_a_source_within_an_unfinished_destination(tmp_path):
    destination = tmp_path / "destination"
    with staged(destination) as folder:
        shutil.copytree(TINY / "speech-lora", folder / "source")
    (destination / staging._MARKER).touch()
    with pytest.raises(CheckpointError, match=r"is where .*destination would be written first"):
        to_orbax(destination / "source", destination)
    assert len(os.listdir(destination / "source")) == 2


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
        to_orbax(tmp_path / "nowhere", tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())
    write(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b" / "file").exists()


@pytest.mark.parametrize("other", ["finishes", "fails", "goes on"])
@pytest.mark.parametrize("leftover", [False, True])
def test_runs_at_the_same_time(tmp_path, monkeypatch, other, leftover):
    """Another run comes between a run's making of the folder and its lock on it."""
    destination, flock = tmp_path / "destination", fcntl.flock
    if leftover:
        killed(destination)
    with contextlib.ExitStack() as running:

        def late(descriptor, how):
            monkeypatch.setattr(fcntl, "flock", flock)
            if other == "goes on":
                (running.enter_context(staged(destination)) / "file").write_text("other")
            elif other == "finishes":
                write(destination, "other")
            else:
                with contextlib.suppress(ZeroDivisionError), staged(destination):
                    raise ZeroDivisionError
            flock(descriptor, how)

        monkeypatch.setattr(fcntl, "flock", late)
        with pytest.raises(CheckpointError, match="another process is writing it"):
            write(destination)
        assert destination.exists() == (other == "finishes")
    if other != "fails":
        assert (destination / "file").read_text() == "other"
        assert os.listdir(tmp_path) == ["destination"]


def test_a_destination_that_appears_meanwhile(tmp_path):
    precious = tmp_path / "destination" / "precious"
    with pytest.raises(CheckpointError, match="cannot be written"), staged(precious.parent):
        shutil.copytree(TINY / "speech-lora", precious)
    assert os.listdir(tmp_path) == ["destination"]
    assert len(os.listdir(precious)) == 2


def test_the_converters_hold_the_name_first(tmp_path):
    with (
        staged(tmp_path / "destination"),
        pytest.raises(CheckpointError, match="another process is writing it"),
    ):
        to_orbax(TINY, tmp_path / "destination")
