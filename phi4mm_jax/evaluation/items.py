"""Items of a manifest, prompts with their accepted answers, in the form that training reads."""

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi4mm_jax.data.conversation import read_conversation
from phi4mm_jax.data.manifests import open_manifest
from phi4mm_jax.errors import InputError
from phi4mm_jax.processing.media_urls import with_paths

_MAX_SHOWN = 5


@dataclass(frozen=True)
class Item:
    """Prompt with its accepted answers.

    Attributes:
        where: its file and line.
        id: of its line, if it has one.
        prompt: chat messages, up to the answer.
        references: the answers that are accepted, one or more.
    """

    where: str
    id: Any
    prompt: list[dict[str, Any]]
    references: tuple[str, ...]


def read_items(path: Path, max_items: int | None = None) -> list[Item]:
    """Read the items of a manifest, conversations in any form that training reads.

    The last message, of role assistant, is the reference; "answers" has further accepted ones, and may replace it.

    Args:
        max_items: the number of items to read, from all over the manifest; None reads all.

    Raises:
        InputError: the manifest cannot be read, or lines have no reference: none is left out silently.
    """
    items, faults = [], []
    with closing(open_manifest(path)) as manifest:
        count = len(manifest) if max_items is None else min(max_items, len(manifest))
        for number in (i * len(manifest) // count for i in range(count)):
            where = manifest.where(number)
            try:
                items.append(_item(where, manifest.read(number), manifest.folder))
            except InputError as error:
                faults.append(f"{where}: {error}")
    if faults:
        more = f"; and {len(faults) - _MAX_SHOWN} more lines" if len(faults) > _MAX_SHOWN else ""
        raise InputError(f"{'; '.join(faults[:_MAX_SHOWN])}{more}. Repair what has no reference, or take it out")
    return items


def _item(where: str, values: Any, folder: Path) -> Item:
    if not isinstance(values, Mapping):
        raise InputError(f"the item is a {type(values).__name__}; expected an object with messages")
    messages = read_conversation(values).messages
    accepted = [] if values.get("answers") is None else values["answers"]
    if not isinstance(accepted, list) or not all(isinstance(a, str) for a in accepted):
        raise InputError(f"answers is {accepted!r:.60}; expected a list of strings")
    if messages[-1].get("role") == "assistant":
        *messages, last = messages
        accepted = [_text(last), *accepted]
    if not accepted:
        raise InputError('no reference; end the messages with one of role assistant, or give "answers"')
    if not messages:
        raise InputError("the messages have nothing before the answer")
    return Item(where, values.get("id"), with_paths(messages, folder), tuple(dict.fromkeys(accepted)))


def _text(answer: Mapping[str, Any]) -> str:
    content = answer.get("content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = [part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None for part in parts]
    if not texts or answer.get("tool_calls") or not all(isinstance(text, str) for text in texts):
        raise InputError("the answer is not plain text")
    return "".join(text for text in texts if text is not None)
