"""Limits of what a request may hold and how long it may take."""

from dataclasses import dataclass

from phi4mm_jax.errors import InputError
from phi4mm_jax.processing.images import MAX_PIXELS
from phi4mm_jax.processing.recordings import CutSettings
from phi4mm_jax.processing.video import MAX_FRAMES
from phi4mm_jax.utils.checks import check_whole, is_number

_MIB = 2**20


@dataclass(frozen=True)
class Limits:
    """Limits of a server; a request beyond one is refused by an error that names it.

    Attributes:
        max_body_bytes: of a request, its media included.
        held_bytes: of all bodies together that the server has at a time; more are refused for the moment.
        file_bytes: of a file for batches.
        stored_bytes: of all files for batches together.
        max_images: of a request, a video being as many as it may have frames.
        max_pixels: of an image.
        audios: clips of a request.
        max_audio_seconds: of all clips of a request together.
        choices: the most answers to one prompt (`n`).
        prompts: the most prompts of one request for completions.
        top_logprobs: the most alternatives of each token.
        beams: of a request (`use_beam_search`); 1: no request has several.
        draft_tokens: the most that are guessed in a step, of requests with `draft`; 0: there are none.
        clip_seconds: the most seconds of a clip that is transcribed as one; longer ones are cut at silence.
        pause: seconds of silence that end a clip of a longer recording in any case.
        max_new_tokens: of answers whose request does not say.
        remote_bytes: of a medium that is fetched.
        remote_seconds: that fetching all media of a request may take.
        max_waiting: requests that wait for the engine; more are refused for the moment.
        timeout: seconds that a request may take, waiting included, which may itself ask for less.

    Raises:
        InputError: a limit is no positive number.
    """

    max_body_bytes: int = 64 * _MIB
    held_bytes: int = 4096 * _MIB
    file_bytes: int = 512 * _MIB
    stored_bytes: int = 8192 * _MIB
    max_images: int = MAX_FRAMES
    max_pixels: int = MAX_PIXELS
    audios: int = 16
    max_audio_seconds: int = 1800
    clip_seconds: float = CutSettings.clip_seconds
    pause: float = CutSettings.pause
    choices: int = 16
    prompts: int = 64
    top_logprobs: int = 20
    beams: int = 1
    draft_tokens: int = 0
    max_new_tokens: int = 1024
    remote_bytes: int = 32 * _MIB
    remote_seconds: int = 20
    max_waiting: int = 256
    timeout: float = 600.0

    def __post_init__(self):
        for name in vars(self):
            if name not in ("timeout", "clip_seconds", "pause"):
                check_whole(name, getattr(self, name), 0 if name in ("top_logprobs", "draft_tokens") else 1)
        if not is_number(self.timeout) or not self.timeout > 0:
            raise InputError(f"timeout is {self.timeout!r:.60}; expected a positive number")
        CutSettings(self.clip_seconds, self.pause)  # checks them

    @property
    def cut(self) -> CutSettings:
        """Settings by which recordings longer than a clip are cut."""
        return CutSettings(self.clip_seconds, self.pause)
