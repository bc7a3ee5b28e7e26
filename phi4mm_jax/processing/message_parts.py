"""Content of a chat message: its parts, in the forms of OpenAI, transformers and vLLM, as texts and media.

Whatever seems to hold a medium and is not taken is refused: it would be lost.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from phi4mm_jax.errors import InputError, MediaError
from phi4mm_jax.processing.images import check_max_crops
from phi4mm_jax.processing.media_urls import decode_base64, locate, refuse_segment
from phi4mm_jax.processing.prompt import KINDS, Kind
from phi4mm_jax.processing.video import MAX_FRAMES, Frame, crops_per_frame, video_frames

NEXT = object()  # stands for the next of the media given beside the messages


# What stands for a part's own key, as transformers has it.
_SOURCES = ("url", "path", "base64")
_URLS = {"image_url": "image", "input_image": "image", "audio_url": "audio", "video_url": "video"}
_TEXTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_TYPES = ("text", *_URLS, "input_audio", "image", "audio", "video")
_DETAILS = ("low", "high", "auto", "original")


def parse_part(where: str, part: Any, crop_size: int) -> Iterator[str | tuple[Kind, Any]]:
    """Yield the texts and media of a part of a message's content, media as (kind, source or `NEXT`).

    Args:
        crop_size: pixels of a crop's side, to which the frames of a video are shrunk.

    Raises:
        InputError: it fits no form that `render_chat` takes; it begins with `where`.
    """
    if not isinstance(part, Mapping):
        raise InputError(f'{where} is {type(part).__name__}: pass a dict such as {{"type": "text", "text": ...}}')
    given = {key: value for key, value in part.items() if value is not None}  # tables give every part all keys
    kind = given.get("type")
    if kind is None:
        found = [key for key in _TYPES if key in given]
        kind = found[0] if len(found) == 1 else None
    if not isinstance(kind, str):
        kind = None
    if kind in _TEXTS:
        _check_keys(where, given, _TEXTS[kind])
        yield string_at(where, part, _TEXTS[kind])
    elif kind in _URLS:
        yield from _url_part(where, part, given, kind, crop_size)
    elif kind == "input_audio":
        _check_keys(where, given, kind)
        yield "audio", _input_audio(where, part)
    elif kind == "image_pil":
        _check_keys(where, given, kind)
        yield "image", _payload(where, {"image": given.get(kind, NEXT)}, "image")
    elif kind in KINDS:
        payload = _payload(where, given, kind)
        beside = _object_at(given, kind)
        _check_settings(f"{where}.{kind}", beside, *_PART_SETTINGS[kind])
        yield kind, payload if kind == "audio" else _detailed(where, payload, {**given, **beside})
    elif kind == "video":
        payload = _payload(where, given, kind)
        if payload is NEXT:
            raise InputError(f"{where}.video is {kind_of(part, kind)}: pass a path, a file's bytes or a list of images")
        beside = _object_at(given, kind)
        _check_settings(f"{where}.video", beside, *_PART_SETTINGS[kind])
        yield from _frames(f"{where}.video", payload, {**given, **beside}, crop_size)
    else:
        raise InputError(
            f"{where}.type is {part.get('type')!r:.60}: it must be text, image_url, input_audio, image, audio or video"
        )


def _url_part(
    where: str, part: Mapping[str, Any], given: Mapping[str, Any], kind: str, crop_size: int
) -> Iterator[tuple[Kind, Any]]:
    """Yield the media at a URL: a string, or in an object with settings beside it."""
    key, medium = "image_url" if kind == "input_image" else kind, _URLS[kind]
    at, inner, known = f"{where}.{key}", given.get(key), ("url", *_PART_SETTINGS[medium])
    _check_keys(where, given, key, *known)
    refuse_segment(where, given, medium)
    if isinstance(inner, Mapping):
        beside = _object_at(given, key)
        _check_keys(at, beside, key, *known)
        refuse_segment(at, beside, medium)
        given, at_url, url = {**given, **beside}, f"{at}.url", string_at(at, inner, "url")
    else:
        at_url, url = at, string_at(where, part, key)
    source = locate(at_url, url, medium)
    if medium == "video":
        yield from _frames(at_url, source, given, crop_size)
    elif medium == "image":
        yield "image", _detailed(at, source, given)
    else:
        yield "audio", source


def _object_at(given: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return the object at a key, without nulls; {} where something else is there."""
    inner = given.get(key)
    return {str(k): v for k, v in inner.items() if v is not None} if isinstance(inner, Mapping) else {}


def _input_audio(where: str, part: Mapping[str, Any]) -> Any:
    inner, at = part.get("input_audio"), f"{where}.input_audio"
    if not isinstance(inner, Mapping):
        found = kind_of(part, "input_audio")
        raise InputError(f'{at} is {found}: pass {{"data": base64, "format": "wav"}}')
    _check_settings(at, inner)
    refuse_segment(at, inner, "audio")
    data = string_at(at, inner, "data")
    is_url = data[:5].lower() == "data:"
    return locate(f"{at}.data", data, "audio") if is_url else decode_base64(f"{at}.data", data)


def _check_settings(where: str, given: Mapping[str, Any], *known: str) -> None:
    for key, value in given.items():
        if key in _SETTINGS and key not in known and value is not None:
            remedy = "give max_crops" if key == "detail" and "max_crops" in known else "leave it out"
            raise InputError(f"{where}.{key} is a setting that is not taken here; {remedy}")


# Of media, in the parts of others; those that are taken are named where they are.
_SETTINGS = frozenset({
    "detail", "fps", "frames", "nframes", "num_frames", "max_frames", "min_frames", "max_crops", "max_pixels",
    "min_pixels", "total_pixels", "resized_height", "resized_width", "video_start", "video_end",
})  # fmt: skip


def _check_keys(where: str, given: Mapping[str, Any], *known: str) -> None:
    """Refuse a medium, or a setting of one, beside what the part's type says: it would be lost."""
    _check_settings(where, given, *known)
    for key, value in given.items():
        if key not in ("type", *known) and looks_like_media(key, value):
            raise InputError(f"{where}.{key} is not taken in a part of type {given.get('type', known[0])}: make it one")


def _detailed(where: str, source: Any, given: Mapping[str, Any]) -> Any:
    """Return an image with the detail that OpenAI's form asks for: "low" is one crop besides the global view."""
    detail = given.get("detail")
    if detail not in (None, *_DETAILS):
        raise InputError(f"{where}.detail is {detail!r:.60}: it must be one of {', '.join(_DETAILS)}")
    if detail == "low" and source is NEXT:
        raise InputError(f"{where}.detail: an image that is given beside the messages has none; use max_crops")
    return Frame(source, 1) if detail == "low" else source


def string_at(where: str, mapping: Mapping[str, Any], key: str) -> str:
    """Return the string at a key, or raise an InputError that names the key."""
    value = mapping.get(key)
    if not isinstance(value, str):
        raise InputError(f"{where}.{key} is {kind_of(mapping, key)}: pass a string")
    return value


def kind_of(mapping: Mapping[str, Any], key: str) -> str:
    """Name the type of the value at a key, for an error."""
    return type(mapping[key]).__name__ if key in mapping else "missing"


_PART_SETTINGS = {"image": ("detail",), "audio": (), "video": ("frames", "max_crops")}


def _payload(where: str, given: Mapping[str, Any], kind: str) -> Any:
    """Return the medium of a part of type image, audio or video, or `NEXT`."""
    sources = (kind, *_SOURCES)
    for key in given:
        if key not in ("type", *sources, *_PART_SETTINGS[kind], "uuid", "cache_control"):
            raise InputError(
                f'{where}.{key}: a part of type {kind} has only the key "{kind}", or {", ".join(_SOURCES)}; put the '
                f"{kind} there"
            )
    found = [key for key in sources if key in given]
    if len(found) > 1:
        raise InputError(f"{where} has both {found[0]} and {found[1]}: give the {kind} once")
    if not found:
        return NEXT
    source, at = given[found[0]], f"{where}.{found[0]}"
    if found[0] == "base64" and isinstance(source, str) and source[:5].lower() != "data:":
        return decode_base64(at, source)
    return source if source is NEXT else locate(at, source, kind)


def _frames(
    where: str, source: Any, given: Mapping[str, Any], crop_size: int
) -> Iterator[tuple[Literal["image"], Frame]]:
    """Yield the frames of a video, as images."""
    max_crops = given.get("max_crops")
    if max_crops is not None:
        check_max_crops(f"{where.removesuffix('.video')}.max_crops", max_crops)
    try:
        frames = video_frames(source, given.get("frames", MAX_FRAMES), max_crops, crop_size)
    except InputError as error:
        raise MediaError(f"{where}: {error}") from error
    for image in frames:
        yield "image", Frame(image, max_crops or crops_per_frame(len(frames)))


# Keys that seem to hold a medium.

_MEDIA_WORDS = {
    "image", "img", "picture", "pic", "photo", "pixel", "frame", "video", "clip", "audio", "sound", "speech", "wav",
    "media", "medium",
}  # fmt: skip
# A key that ends with one of these tells something about a medium.
_ABOUT = {
    "id", "ids", "size", "sizes", "width", "height", "duration", "length", "seconds", "rate", "format", "type",
    "caption", "description", "title", "alt", "text", "transcript", "transcription", "language", "lang", "source",
    "license", "author", "hash", "md5", "sha1", "sha256", "count", "number", "index",
}  # fmt: skip
_MEDIA_FILE = re.compile(
    r"\S+\.(png|jpe?g|webp|gif|bmp|tiff?|wav|flac|mp3|ogg|opus|m4a|aac|mp4|mov|mkv|webm|avi)", re.IGNORECASE
)


def words_of(key: Any) -> list[str]:
    """Split a key into its words, however it is written: image_path, imagePath and image-path have two."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[^A-Za-z0-9]+", " ", str(key)).lower().split()


def names_media_file(key: Any, value: Any) -> bool:
    """Return whether a value is the name of a media file, or a list of such, and its key is not about a medium."""
    names = value if isinstance(value, list) and value else [value]
    return words_of(key)[-1:] not in ([word] for word in _ABOUT) and all(
        isinstance(name, str) and _MEDIA_FILE.fullmatch(name) for name in names
    )


def looks_like_media(key: Any, value: Any) -> bool:
    """Return whether a key that is not taken seems to hold a medium, by its name or because it holds bytes.

    Numbers, switches and empty values are none.
    """
    if isinstance(value, Mapping) and value.keys() == {"bytes", "path"}:
        return any(v is not None for v in value.values())
    if value is None or isinstance(value, bool | int | float):
        return False
    if isinstance(value, str | bytes | list | tuple | Mapping) and not value:
        return False
    words = words_of(key)
    named = any(word.removesuffix("s") in _MEDIA_WORDS for word in words) and words[-1] not in _ABOUT
    numbers = isinstance(value, list | tuple) and all(isinstance(v, int | float) for v in value) and "pixel" not in key
    return isinstance(value, bytes) or (named and not numbers)
