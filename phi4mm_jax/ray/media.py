"""Rows as lines of JSON, and their media: bytes, references to Ray's object store, and URLs of cloud storage."""

import base64
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayError

from phi4mm_jax.engine import Request
from phi4mm_jax.engine.jsonl import KEYS
from phi4mm_jax.errors import InputError
from phi4mm_jax.ray.storage import SCHEMES, read_file

REQUEST = KEYS - {"id"}  # columns that make a request; others are passed on
_REMOTE = re.compile(rf"({'|'.join(SCHEMES)}):/+", re.IGNORECASE)
_KINDS = {  # keys that hold a medium in a message's content, and its kind
    "image": "image", "image_url": "image", "audio": "audio", "audio_url": "audio", "video": "video",
    "video_url": "video",
}  # fmt: skip


def as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """A row as a line of a request file has it: without nulls, and media that are bytes as data URLs.

    Raises:
        InputError: a reference holds something else than the bytes of a file, or cannot be read.
    """
    found = {key: value for key, value in values.items() if value is not None}
    for name, kind in (("images", "image"), ("audios", "audio")):
        if isinstance(found.get(name), list):
            found[name] = [_inlined(medium, kind) for medium in found[name] if medium is not None]
    if isinstance(found.get("messages"), list):
        found["messages"] = _parts(found["messages"])
    if isinstance(found.get("grammar"), Mapping):  # a column has every kind that a row of it has
        found["grammar"] = {kind: value for kind, value in found["grammar"].items() if value is not None}
    return found


def fetch_remote(request: Request) -> Request:
    """The request with the content of media whose URLs Ray Data reads, such as gs:// and s3://; others as they are.

    Raises:
        InputError: one cannot be read.
    """
    images, audios = ([_content(medium) for medium in media] for media in (request.images, request.audios))
    prompt = request.prompt if isinstance(request.prompt, str) else _fetched(request.prompt)
    return replace(request, images=images, audios=audios, prompt=prompt)


def _parts(value: Any) -> Any:
    """A message, its content or a part of it; columns of unlike parts have nulls for the keys that one lacks."""
    if isinstance(value, list):
        return [_parts(inner) for inner in value]
    if not isinstance(value, Mapping):
        return value
    given = {key: inner for key, inner in value.items() if inner is not None}
    return {key: _inlined(inner, _KINDS[key]) if key in _KINDS else _parts(inner) for key, inner in given.items()}


def _inlined(medium: Any, kind: str) -> Any:
    if isinstance(medium, list):  # frames of a video
        return [_inlined(inner, "image") for inner in medium]
    if isinstance(medium, Mapping):  # as data sets store it
        given = {key: inner for key, inner in medium.items() if inner is not None}
        return _inlined(given["bytes"], kind) if "bytes" in given else given.get("path", given)
    if isinstance(medium, ray.ObjectRef):
        try:
            medium = ray.get(medium)
        except RayError as error:
            cause = getattr(error, "cause", None) or error  # what the task that was to make it has raised
            text = " ".join(f"{type(cause).__name__}: {cause}".split())
            raise InputError(f"{kind}: its reference cannot be read ({text:.600}); put it again") from error
        if not isinstance(medium, bytes | bytearray | memoryview):
            raise InputError(
                f"{kind}: its reference holds a {type(medium).__name__}; put a file's bytes into the object store"
            )
    if not isinstance(medium, bytes | bytearray | memoryview):
        return medium
    return f"data:{kind}/unknown;base64,{base64.b64encode(medium).decode()}"


def _fetched(value: Any) -> Any:
    if isinstance(value, list):
        return [_fetched(inner) for inner in value]
    if not isinstance(value, Mapping):
        return value
    return {key: _medium(inner) if key in (*_KINDS, "url", "path") else _fetched(inner) for key, inner in value.items()}


def _medium(value: Any) -> Any:
    if isinstance(value, list):
        return [_medium(inner) for inner in value]
    if isinstance(value, Mapping):
        return _fetched(value)
    return _content(value)


def _content(medium: Any) -> Any:
    return read_file(medium) if isinstance(medium, str) and _REMOTE.match(medium) else medium
