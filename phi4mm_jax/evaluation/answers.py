"""Answers of a model to all items, kept in a folder from which a stopped run resumes."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from phi4mm_jax.checkpoint.contents import read_config
from phi4mm_jax.checkpoint.hub import local_folder
from phi4mm_jax.checkpoint.peft import adapter_folders
from phi4mm_jax.engine import Engine, Request
from phi4mm_jax.engine.answer_file import AnswerFile
from phi4mm_jax.engine.jsonl import Line
from phi4mm_jax.engine.request import Draft
from phi4mm_jax.errors import InputError
from phi4mm_jax.evaluation.items import Item
from phi4mm_jax.utils.files import INCOMPLETE, make_folder, write_atomically, writing
from phi4mm_jax.utils.fingerprint import weights_fingerprint
from phi4mm_jax.utils.strict_json import strict_json

ANSWERS, SETTINGS = "answers.jsonl", "settings.json"
AUTO: Literal["auto"] = "auto"


@dataclass(frozen=True)
class Answer:
    """Outcome of an item.

    Attributes:
        text: None if it failed.
        error: why, with its file and line.
        cut: whether it reached `max_new_tokens`.
    """

    text: str | None
    error: str | None = None
    cut: bool = False


@dataclass(frozen=True)
class Settings:
    """Settings that answers depend on, besides the files of media."""

    model: str
    weights: str
    dtype: str
    adapter: str  # or "auto"
    max_new_tokens: int
    prompts: str


def check_adapter(model: str | Path, adapter: str | None, adapters: Mapping[str, str | Path] | None = None) -> None:
    """Raise an InputError where a checkpoint lacks the adapter; another where its config.json cannot be read.

    Args:
        adapters: given beside the checkpoint, as to `phi4mm_jax.load`.
    """
    present = dict.fromkeys(read_config(local_folder(model)).loras)
    present |= dict.fromkeys(adapter_folders(adapters))
    if adapter not in (None, "none", *present):
        found = " and ".join(present) or "none"
        raise InputError(f"{model}: has no {adapter} adapter (it has {found}); choose another, or another checkpoint")


def settings_of(
    model: str | Path,
    dtype: str,
    adapter: str | None,
    max_new_tokens: int,
    items: Sequence[Item],
    adapters: Mapping[str, str | Path] | None = None,
) -> Settings:
    """Return the settings of a run: weights by their fingerprint, which a copy has too, prompts by their digest.

    Raises:
        CheckpointError: there is no such model or adapter.
    """
    weights = weights_fingerprint(local_folder(model), adapter_folders(adapters))
    prompts = _digest((item.where, item.prompt) for item in items)
    return Settings(str(model), weights, dtype, adapter or AUTO, max_new_tokens, prompts)


def _digest(parts: Iterator[Any]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(repr(part).encode("utf-8", "backslashreplace"))
    return digest.hexdigest()


def ask(
    engine: Engine,
    items: Sequence[Item],
    max_new_tokens: int,
    adapter: str | None = None,
    ended: Callable[[], bool] = lambda: False,
    *,
    max_crops: int | None = None,
) -> list[Answer] | None:
    """Return the answers of an engine, in the order of the items.

    Args:
        adapter: of all items; by default each is answered with that of its media.
        ended: called after each answer; once it returns True, the result is None.
        max_crops: of an image.
    """
    answers: dict[int, Answer] = {}
    requests = (_request(item, max_new_tokens, adapter, max_crops=max_crops) for item in items)
    for i, completion in engine.run(requests):
        if ended():
            return None
        if completion.error is not None:
            answers[i] = Answer(None, f"{items[i].where}: {completion.error}")
        else:
            answers[i] = Answer(completion.text, cut=completion.finish_reason == "length")
    return [answers[i] for i in range(len(items))]


@contextmanager
def answer_file(
    folder: Path, settings: Settings, items: Sequence[Item], draft: Draft | None = None
) -> Iterator[AnswerFile]:
    """Open the answers of the items in a folder, which becomes this run's.

    Args:
        draft: see `Request`; no answer depends on it.

    Raises:
        InputError: the folder holds something else, such as another run's answers, or cannot be written to.
    """
    claim_folder(folder, settings)
    adapter = None if settings.adapter == AUTO else settings.adapter
    requests = (_request(item, settings.max_new_tokens, adapter, draft) for item in items)
    lines = [Line(i, x.where, x.where, request) for i, (x, request) in enumerate(zip(items, requests, strict=True))]
    with AnswerFile(folder / ANSWERS, lines, retry=False) as answers:
        yield answers


def _request(
    item: Item, max_new_tokens: int, adapter: str | None, draft: Draft | None = None, max_crops: int | None = None
) -> Request:
    return Request(item.prompt, max_new_tokens=max_new_tokens, adapter=adapter, draft=draft, max_crops=max_crops)


def claim_folder(folder: Path, settings: Settings) -> None:
    """Make a folder for the answers of these settings, or check that it is.

    Raises:
        InputError: the folder holds something else, or cannot be written to.
    """
    path, now = folder / SETTINGS, asdict(settings)
    with writing(folder, "cannot be written to"):
        make_folder(folder)
        before = path.read_text() if path.exists() else None
        is_empty = all(p.name.endswith(INCOMPLETE) for p in folder.iterdir())
        if is_empty:
            write_atomically(path, strict_json(now, indent=1))
    if is_empty:
        return
    try:
        found = json.loads(before or "")
        key = next((key for key in now if found[key] != now[key] and key != "model"), None)  # a copy has its weights
    except (ValueError, LookupError, TypeError):
        raise InputError(f"{folder}: holds something else; give another folder") from None
    if key is not None:
        change = f"{found[key]}, now {now[key]}"
        if key == "weights":  # "HASH ADAPTER=HASH ...", which say nothing to a reader
            (before, *parts), (after, *others) = (settings[key].split() for settings in (found, now))
            adapters = sorted({part.partition("=")[0] for part in {*parts} ^ {*others}})
            change = f"of {found['model']}, now {now['model']}" if before != after else f"by {', '.join(adapters)}"
        raise InputError(f"{folder}: holds answers of other {key} ({change}); give another folder")


def read_answers(folder: Path, items: Sequence[Item]) -> list[Answer]:
    """Return the answers in the folder of a finished run."""
    answers: dict[str, Answer] = {}
    for line in (folder / ANSWERS).read_bytes().splitlines():
        found = json.loads(line)
        if "error" in found:
            answers[found["id"]] = Answer(None, found["error"])
        else:
            answers[found["id"]] = Answer(found["text"], cut=found["finish_reason"] == "length")
    return [answers[item.where] for item in items]
