"""Media of chat messages as clients send them: checked, and turned into bytes.

A server opens no file that a client names: media are data URLs, base64, or, where that is allowed, fetched.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from phi4mm_jax.errors import InputError, MediaError
from phi4mm_jax.processing.audio import measure_audio
from phi4mm_jax.processing.images import image_size
from phi4mm_jax.processing.media_urls import decode_base64, locate
from phi4mm_jax.processing.video import MAX_FRAMES, check_frames
from phi4mm_jax.serve.limits import Limits

_KINDS = {"image_url": "image", "input_image": "image", "audio_url": "audio", "video_url": "video"}


@dataclass
class _Count:
    images: int = 0
    audios: int = 0
    audio_seconds: float = 0.0
    fetch_end: float = 0.0  # by time.monotonic


@dataclass(frozen=True)
class MediaReader:
    """Reads the media of messages. Call it in a thread: it decodes, and may download.

    Attributes:
        fetch: downloads a URL within some seconds; None where that is not allowed.
    """

    limits: Limits
    fetch: Callable[[str, str, float], bytes] | None = None

    def __call__(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return the messages with each medium as bytes, in parts that `render_chat` takes.

        Raises:
            InputError: a medium is none, not allowed, or beyond a limit.
        """
        count = _Count(fetch_end=time.monotonic() + self.limits.remote_seconds)
        return [self._message(f"messages[{i}]", message, count) for i, message in enumerate(messages)]

    def audio(self, where: str, content: bytes) -> float:
        """Check a clip; return its seconds."""
        return self._check_audio(where, content, _Count())

    def _message(self, where: str, message: Mapping[str, Any], count: _Count) -> dict[str, Any]:
        content = message.get("content")
        if isinstance(content, list):
            content = [self._part(f"{where}.content[{i}]", part, count) for i, part in enumerate(content)]
        return {**message, "content": content}

    def _part(self, where: str, part: Mapping[str, Any], count: _Count) -> Mapping[str, Any]:
        kind = part.get("type")
        if kind == "input_audio":
            data = part[kind]["data"]
            at = f"{where}.input_audio.data"
            content = locate(at, data, "audio") if data[:5].lower() == "data:" else decode_base64(at, data)
            self._check_audio(at, content, count)
            return {"type": "audio", "audio": content}
        if kind not in _KINDS:
            return part
        key = "image_url" if kind == "input_image" else kind
        given = part[key] if isinstance(part[key], Mapping) else {**part, "url": part[key]}
        settings = {name: given[name] for name in ("detail", "frames", "max_crops") if given.get(name) is not None}
        at, medium = f"{where}.{key}", _KINDS[kind]
        content = self._content(at, given["url"], medium, count)
        getattr(self, f"_check_{medium}")(at, content, count, **({"settings": settings} if medium == "video" else {}))
        return {"type": medium, medium: content} | settings

    def _content(self, where: str, url: str, kind: str, count: _Count) -> bytes:
        scheme = url[: url.find(":") + 1].lower()
        if scheme == "data:":
            return locate(where, url, kind)
        if scheme not in ("http:", "https:"):
            raise MediaError(f"{where} is {url!r:.80}: pass a data URL, data:{kind}/...;base64,...")
        if self.fetch is None:
            raise MediaError(
                f"{where} is {url!r:.200}: this server fetches nothing (--allow-remote-media); pass a data URL, "
                f"data:{kind}/...;base64,..."
            )
        return self.fetch(where, url, max(count.fetch_end - time.monotonic(), 0.0))

    def _check_image(self, where: str, content: bytes, count: _Count) -> None:
        self._count_images(where, 1, count)
        self._measured(where, lambda: image_size(content, self.limits.max_pixels))

    def _check_audio(self, where: str, content: bytes, count: _Count) -> float:
        count.audios += 1
        limits = self.limits
        if count.audios > limits.audios:
            raise MediaError(f"{where} is clip {count.audios} of the request, and {limits.audios} may be; send fewer")
        left = limits.max_audio_seconds - count.audio_seconds
        samples, rate = self._measured(where, lambda: measure_audio(content, max(left, 0.0)))
        count.audio_seconds += samples / rate
        return samples / rate

    def _check_video(self, where: str, _: bytes, count: _Count, settings: Mapping[str, Any]) -> None:
        frames = settings.get("frames", MAX_FRAMES)
        check_frames(frames)
        self._count_images(where, frames, count)

    def _count_images(self, where: str, more: int, count: _Count) -> None:
        count.images += more
        if count.images > self.limits.max_images:
            raise MediaError(
                f"{where} makes {count.images} images and frames of the request, and {self.limits.max_images} may be; "
                "send fewer, or ask for fewer frames"
            )

    @staticmethod
    def _measured(where: str, measure: Callable[[], tuple[int, int]]) -> tuple[int, int]:
        try:
            return measure()
        except InputError as error:
            raise MediaError(f"{where}: {error}") from error
