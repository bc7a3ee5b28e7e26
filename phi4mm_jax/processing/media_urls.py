"""Forms that media of a prompt come in: paths, data URLs, file URLs, base64, objects of a data set."""

import base64
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.request import url2pathname

from phi4mm_jax.errors import InputError

# Keys of an object that say which part of its medium is meant.
_SEGMENT = ("start", "end", "offset", "start_time", "end_time", "bbox", "box", "crop")


def locate(where: str, url: Any, kind: str) -> Any:
    """Return what a URL points to; a path, or anything else, as it is.

    That is the bytes of a data URL or of base64, the path of a file URL, and the medium in an object of a data set.

    Raises:
        InputError: the URL is broken, or of the network; it begins with `where`.
    """
    if isinstance(url, Mapping):
        return _stored(where, url, kind)
    if isinstance(url, list) and kind == "video":
        return [locate(f"{where}[{i}]", frame, "image") for i, frame in enumerate(url)]
    if not isinstance(url, str):
        return url
    if is_base64(url):
        return decode_base64(where, url)
    scheme = url[: url.find(":") + 1].lower()
    if scheme == "data:":
        header, comma, data = url.partition(",")
        media_type, *options = header[len("data:") :].lower().split(";")
        if not comma or options[-1:] != ["base64"] or media_type.split("/")[0] not in ("", "application", kind):
            raise InputError(f"{where} begins with {header!r:.60}: a data URL must read data:{kind}/...;base64,...")
        return decode_base64(where, data)
    if scheme == "file:":
        host, slash, path = url[len("file:") :].removeprefix("//").partition("/")
        if host not in ("", "localhost") or not slash:
            raise InputError(f"{where} is {url!r:.200}: a file URL must read file:///path")
        return Path(url2pathname("/" + path))
    if "://" in url[:64]:
        raise InputError(f"{where} is {url!r:.200}: nothing is downloaded; fetch it and pass the bytes or a path")
    if not url:
        raise InputError(f"{where} is an empty string: pass a data URL, a file URL or a path")
    return url


def _stored(where: str, found: Mapping[str, Any], kind: str) -> Any:
    """Return the medium in an object such as those in which `datasets` stores images, audio and video."""
    given = {key: value for key, value in found.items() if value is not None}
    refuse_segment(where, given, kind)
    if kind == "audio" and {"array", "sampling_rate"} <= given.keys():
        return given["array"], given["sampling_rate"]
    for key in ("bytes", "base64", "path", "url", kind):
        if key in given:
            source = given[key]
            is_text = key in ("bytes", "base64") and isinstance(source, str) and source[:5].lower() != "data:"
            return decode_base64(f"{where}.{key}", source) if is_text else locate(f"{where}.{key}", source, kind)
    keys = ", ".join(map(str, found)) or "no keys"
    raise InputError(f"{where} is an object with {keys:.80}: give it bytes, path, url or base64")


def refuse_segment(where: str, given: Mapping[str, Any], kind: str) -> None:
    """Raise an InputError that begins with `where` if an object says which part of its medium is meant."""
    if (segment := next((key for key in _SEGMENT if given.get(key)), None)) is not None:
        raise InputError(
            f"{where}.{segment} is {given[segment]!r:.60}: the {kind} would be taken whole; cut it, and take "
            f"{segment} out"
        )


# How the base64 of files begins: PNG, JPEG, GIF, RIFF (WebP, WAV), TIFF, BMP, FLAC, Ogg, MP3, MP4, Matroska.
_BEGINNINGS = (
    "iVBORw0KGgo",
    "/9j/",
    "R0lGOD",
    "UklGR",
    "SUkq",
    "TU0A",
    "Qk",
    "ZkxhQ",
    "T2dnU",
    "SUQz",
    "AAAA",
    "GkXf",
)
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]+={0,2}\s*")
_SHORTEST_FILE, _LONGEST_PATH = 48, 4096  # characters


def is_base64(source: str) -> bool:
    """Return whether a string is the base64 of a file, and no path: it begins like one, or is longer than paths are."""
    if len(source) < _SHORTEST_FILE or not (source.startswith(_BEGINNINGS) or len(source) > _LONGEST_PATH):
        return False
    return _BASE64.fullmatch(source) is not None


def decode_base64(where: str, data: str) -> bytes:
    """Decode the base64 of a file, or raise an InputError that begins with `where`."""
    try:
        content = base64.b64decode("".join(data.split()), validate=True)
    except ValueError as error:
        raise InputError(f"{where} is not base64 ({error}): encode the file's bytes with base64.b64encode") from None
    if not content:
        raise InputError(f"{where} holds no data: encode the file's bytes with base64.b64encode")
    return content


# Paths in files of chats.


_MEDIA = {"image", "audio", "video", "image_url", "audio_url", "video_url", "url", "path"}  # keys of a part, and in it


def is_path(source: str) -> bool:
    """Return whether a string is the path of a medium: no URL, no base64, and not empty."""
    is_url = source[:5].lower() in ("data:", "file:") or "://" in source[:64]
    return bool(source) and not is_url and not is_base64(source)


def path_in(source: str, folder: Path) -> str:
    """Resolve a path relative to the folder; return a URL, or base64, as it is."""
    return str(folder / source) if is_path(source) else source


def with_paths(value: Any, folder: Path) -> Any:
    """Return messages, their content or one of its parts, with the paths of media resolved; nothing else changes."""
    return with_sources(value, lambda source: path_in(source, folder))


def with_sources(value: Any, change: Callable[[str], str]) -> Any:
    """Return messages, their content or one of its parts, each string that stands for a medium changed, in order."""
    if isinstance(value, list):
        return [with_sources(item, change) for item in value]
    if not isinstance(value, dict):
        return value
    return {key: _changed(key, inner, change) for key, inner in value.items()}


def _changed(key: str, value: Any, change: Callable[[str], str]) -> Any:
    if key in _MEDIA and isinstance(value, str):
        return change(value)
    if key == "video" and isinstance(value, list):  # frames
        return [change(frame) if isinstance(frame, str) else with_sources(frame, change) for frame in value]
    return with_sources(value, change) if key == "content" or key in _MEDIA else value
