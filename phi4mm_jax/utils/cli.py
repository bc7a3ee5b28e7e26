"""Start and end of programs: what goes wrong, from their imports on, is one line on standard error.

A package of programs calls `started` as it is imported. The program's `main` is wrapped by `cli_entrypoint`, and reads
its arguments with a `make_parser`. A program has two names: `python -m infer.generate` in a clone, `phi4mm generate`
where the package is installed.
"""

import argparse
import difflib
import json
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, wraps
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn, ParamSpec, TextIO

from phi4mm_jax import __version__
from phi4mm_jax.errors import CheckpointError, ConfigError, InputError

Arguments = ParamSpec("Arguments")

_INTERRUPTED = 130  # as shells have it: 128 + SIGINT
_PATIENCE = 0.5  # seconds for Python to notice an interruption, which C++ keeps from it while it compiles
_EXTRAS = {  # an optional package, as it is imported: the extra that brings it
    "grain": "train", "matplotlib": "train", "pydantic": "train", "yaml": "train", "tensorboardX": "train",
    "rapidfuzz": "evaluate", "sacrebleu": "evaluate", "whisper_normalizer": "evaluate",
    "fastapi": "serve", "prometheus_client": "serve", "starlette": "serve", "uvicorn": "serve",
    "llguidance": "grammar", "ray": "ray", "pyarrow": "ray", "fsspec": "ray",
    "av": "video", "webrtcvad": "transcribe", "peft": "torch", "torch": "torch",
    "transformers": "torch",
}  # fmt: skip
_NEEDED = {  # what all programs need, likewise
    "PIL", "flax", "huggingface_hub", "jax", "jaxlib", "jaxtyping", "librosa", "ml_dtypes", "numpy", "optax", "orbax",
    "rich", "safetensors", "scipy", "soundfile", "tiktoken",
}  # fmt: skip

COMMANDS = {  # what follows `phi4mm`: the program's module, and what it does
    "generate": ("infer.generate", "answer one prompt"),
    "chat": ("infer.chat", "talk with the model in a terminal"),
    "batch": ("infer.batch", "answer a file of prompts"),
    "transcribe": ("infer.transcribe", "write down what is said in recordings"),
    "serve": ("infer.serve", "serve a model by the OpenAI API, with a page to try it"),
    "ray": ("infer.ray", "answer files of prompts on many chips and hosts"),
    "evaluate": ("infer.evaluate", "measure a model on benchmarks"),
    "convert to-orbax": ("convert.to_orbax", "convert a checkpoint to Orbax"),
    "convert to-torch": ("convert.to_torch", "write a checkpoint for PyTorch"),
    "verify": ("convert.verify", "compare a checkpoint with goldens"),
    "record": ("convert.record", "record goldens with transformers"),
    "train sft": ("train.sft", "train on answers"),
    "train dpo": ("train.dpo", "train on preferences"),
    "export": ("train.export", "write what a run has trained as a checkpoint"),
    "prepare": ("train.prepare", "filter a manifest"),
}
_COMMAND_OF = {module: command for command, (module, _) in COMMANDS.items()}
_CALL = re.compile(rf"python -m ({'|'.join(map(re.escape, _COMMAND_OF))})\b")
_MODULE = re.compile(rf"(?<![\w.])(?:python -m )?({'|'.join(map(re.escape, _COMMAND_OF))})\b(?!\.)")
_NEGATIVE = re.compile(r"-\d+|-\d*\.\d+")  # a number, as argparse has it
_ROOT = Path(__file__).parents[2]  # the clone, where this is one

_notice: str | None = None  # see `interruption_says`
_began = threading.Event()  # the program's `main` has: imports are over


def started() -> None:
    """Handle errors and Ctrl-C of a program that `python -m` starts, from here on; nothing where none is started."""
    if sys.argv[:1] == ["-m"]:  # Python has it so while it imports the package of a program
        handle_errors()


def handle_errors() -> None:
    """Make an error, and Ctrl-C, of this process one line from here on, imports included."""
    sys.excepthook, sys.unraisablehook = _end, _end_unraisable
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    noticed = threading.Event()

    def interrupt(*_: Any) -> None:
        if not _began.is_set():  # extensions that are being imported may abort on an exception
            os.write(2, b"interrupted\n")
            os._exit(_INTERRUPTED)
        noticed.set()
        raise KeyboardInterrupt

    def watch() -> None:
        while number := os.read(reading, 1):
            if _notice is not None and number[0] in (signal.SIGINT, signal.SIGTERM):
                os.write(2, f"\n{_notice}\n".encode())  # from here, as the main thread may be compiling
            ours = signal.getsignal(signal.SIGINT) is interrupt  # a program may handle it itself for a while
            if number[0] == signal.SIGINT and ours and not noticed.wait(_PATIENCE):
                os.write(2, b"interrupted\n")
                os._exit(_INTERRUPTED)

    signal.signal(signal.SIGINT, interrupt)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=watch, name="phi4mm-interrupt", daemon=True).start()


@contextmanager
def interruption_says(notice: str) -> Iterator[None]:
    """Say at once what the program does when it is told to end within the body, which handles SIGINT and SIGTERM."""
    global _notice
    _notice = notice
    try:
        yield
    finally:
        _notice = None


def cli_entrypoint(main: Callable[Arguments, int]) -> Callable[Arguments, int]:
    """Make the program's errors, and Ctrl-C, one line on standard error; its status is then 2, or 130."""

    @wraps(main)
    def program(*args: Arguments.args, **kwargs: Arguments.kwargs) -> int:
        _began.set()
        try:
            with log_lines():
                return main(*args, **kwargs)
        except (Exception, KeyboardInterrupt) as error:
            found = ending(error)
            if found is None:
                raise
            line, status = found
            print(line, file=sys.stderr)
            if isinstance(error, KeyboardInterrupt) and sys.excepthook is _end:
                sys.stdout.flush()
                os._exit(status)  # Python would wait for the compiler's threads, or end beneath them
            return status

    return program


class _Lines(logging.Handler):
    """Writes records as plain lines on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        print(_as_called(self.format(record), _CALL), file=sys.stderr)


@contextmanager
def log_lines() -> Iterator[None]:
    """Show what the library logs, as a program's own lines."""
    logger, handler = logging.getLogger("phi4mm_jax"), _Lines()
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # other libraries give the root logger a handler, which would say each line again
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.propagate = propagate
        logger.removeHandler(handler)


class _Parser(argparse.ArgumentParser):
    """Parser that names programs as this one was started, and an unknown option before what that leaves missing."""

    suggest: Callable[[str], str | None] = staticmethod(lambda name: None)

    def format_help(self) -> str:
        return _as_called(super().format_help(), _MODULE)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        given = sys.argv[1:] if args is None else list(args)
        self._check_options(given[: given.index("--")] if "--" in given else given)
        return super().parse_known_args(given, namespace)

    def _check_options(self, given: Sequence[str]) -> None:
        """End with an error if one is not an option of this parser; argparse would name the words behind it."""
        known = self._option_string_actions
        commands = {name for x in self._actions if x.nargs == argparse.PARSER for name in x.choices or ()}
        for word in given:
            if word in commands:
                return  # what follows is the command's, whose own parser looks at it
            name = word.partition("=")[0]
            is_option = name.startswith("-") and name != "-" and " " not in word and not _NEGATIVE.fullmatch(word)
            if is_option and name not in known and (name.startswith("--") or name[:2] not in known):
                shown = [option.lstrip("-") for option, action in known.items() if action.help != argparse.SUPPRESS]
                self.error(f"{name} is not an option; {self._remedy(name.lstrip('-'), shown)}")

    def _remedy(self, name: str, options: Sequence[str]) -> str:
        if (suggestion := self.suggest(name)) is not None:
            return suggestion
        if close := difflib.get_close_matches(name.lower().replace("_", "-"), options, 1):
            return f"did you mean --{close[0]}?"
        return "--help lists them; a value that begins with - is joined to its option by =, a text comes after --"

    def error(self, message: str) -> NoReturn:
        super().error(_as_called(message, _CALL))


def make_parser(
    module: str, description: str | None, suggest: Callable[[str], str | None] | None = None
) -> argparse.ArgumentParser:
    """Return a parser of a program's arguments, with --version.

    Args:
        module: what `python -m` starts.
        suggest: what to write in place of an unknown option, by its name without dashes; None where options are meant.
    """
    parser = _Parser(
        prog=command_of(module),
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.suggest = suggest or parser.suggest
    parser.add_argument("--version", action="version", version=version_line())
    return parser


def command_of(module: str) -> str:
    """Return the words that start a program here; `module` is what `python -m` starts in a clone."""
    return _as_called(f"python -m {module}", _CALL)


def with_program_names(text: str) -> str:
    """Return a text that names programs as modules, such as infer.batch, with the words that start them here."""
    return _as_called(text, _MODULE)


def version_line() -> str:
    """Name and version of the package."""
    return f"phi4mm-jax {__version__}"


def _is_command() -> bool:
    """Return whether programs are called `phi4mm NAME` here: this one was, or there is no clone to start another in."""
    return sys.argv[0].startswith("phi4mm ") or not _is_clone()


@cache
def _is_clone() -> bool:
    return (_ROOT / "pyproject.toml").is_file() and (_ROOT / "infer").is_dir()


def _as_called(text: str, names: re.Pattern[str]) -> str:
    """Return a text that names programs as modules, and extras as in a clone, with the names that they have here."""
    text = text if _is_clone() else re.sub(r"(?<=')\.\[(\w+)\](?=')", lambda found: _with_extra(found[1]), text)
    return names.sub(lambda found: f"phi4mm {_COMMAND_OF[found[1]]}", text) if _is_command() else text


def _with_extra(extra: str) -> str:
    """Return the requirement by which pip installs the package with an extra."""
    if _is_clone():
        return f".[{extra}]"
    try:
        source = json.loads(metadata.distribution("phi4mm-jax").read_text("direct_url.json") or "{}").get("url")
    except metadata.PackageNotFoundError:
        source = None
    return f"phi4mm-jax[{extra}]" + (f" @ {source}" if source else "")


@contextmanager
def named_options(arguments: argparse.Namespace) -> Iterator[None]:
    """Name the option in errors about the setting that it gave: "--top-p is 2", not "top_p is 2"."""
    try:
        yield
    except InputError as error:
        name, is_named, rest = str(error).partition(" is ")
        if not is_named or name not in vars(arguments):
            raise
        raise InputError(f"--{name.replace('_', '-')} is {rest}") from error


@contextmanager
def standard_output(content: str) -> Iterator[TextIO]:
    """Open standard output as a stream of its own: `sys.stdout` would try again, at the end, what it could not write.

    Args:
        content: what is written, for errors.

    Raises:
        InputError: it cannot be written.
    """
    try:
        descriptor, encoding = sys.stdout.fileno(), sys.stdout.encoding
        with open(descriptor, "w", encoding=encoding, errors="backslashreplace", closefd=False) as out:
            yield out
    except OSError as error:
        raise InputError(f"the {content} cannot be written to standard output: {error.strerror}") from error


def _end(kind: type[BaseException], error: BaseException, traceback: Any) -> None:
    """Replace `sys.excepthook`."""
    found = ending(error)
    if found is None:
        sys.__excepthook__(kind, error, traceback)
        return
    line, status = found
    print(line, file=sys.stderr, flush=True)
    os._exit(status)


def _end_unraisable(unraisable: Any) -> None:
    """Replace `sys.unraisablehook`: an interrupted callback would continue."""
    if isinstance(unraisable.exc_value, KeyboardInterrupt):
        _end(KeyboardInterrupt, unraisable.exc_value, None)
    sys.__unraisablehook__(unraisable)


def ending(error: BaseException) -> tuple[str, int] | None:
    """Return the line that a program ends with at an error, and its exit status; None for an unexpected one."""
    if isinstance(error, InputError | ConfigError | CheckpointError):
        return f"error: {_as_called(str(error), _CALL)}", 2
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", _INTERRUPTED
    if isinstance(error, ModuleNotFoundError) and (found := _not_installed(error.name or "")) is not None:
        return f"error: {found}", 2
    if (cause := _backend_error()) is not None:
        return f"error: {cause}", 2
    return None


def _not_installed(name: str) -> str | None:
    """Say which package is missing, and what brings it; None for a package that no program needs."""
    package = name.partition(".")[0]
    if package in _EXTRAS:
        extra = _EXTRAS[package]
        return f"{package} is not installed, which the extra {extra!r} brings; pip install '{_with_extra(extra)}'"
    if package not in _NEEDED:
        return None
    install = " or ".join(f"'{_with_extra(extra)}'" for extra in ("cpu", "cuda", "tpu"))
    return f"{package} is not installed, which all programs need; pip install {install}"


def _backend_error() -> str | None:
    """Return why jax has no device to compute on; None if it has, or was not imported."""
    if "jax" not in sys.modules:
        return None
    import jax

    asked = jax.config.jax_platforms  # type: ignore[attr-defined]
    try:
        jax.devices()
    except Exception as error:  # of several types, an AssertionError among them
        cause = f": {str(error).splitlines()[0]:.200}" if str(error) else ""
        names = [name for name in (asked or "").split(",") if name in ("cuda", "gpu", "tpu")]
        extra = "tpu" if names[:1] == ["tpu"] else "cuda"
        remedy = f"it needs such a device, and pip install '{_with_extra(extra)}'; or " if names else ""
        return f"JAX_PLATFORMS is {asked!r}, which jax cannot use here{cause}; {remedy}unset it to use what there is"
    return None
