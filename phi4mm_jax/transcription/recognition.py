"""Recordings transcribed by an engine: their clips are requests of one batch."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from phi4mm_jax.engine import Engine, Request, Sampling
from phi4mm_jax.errors import InputError
from phi4mm_jax.processing.audio import AudioSource
from phi4mm_jax.processing.recordings import CutSettings, RecordedClip, cut_recording
from phi4mm_jax.transcription.transcripts import Segment


@dataclass(frozen=True)
class Transcript:
    """Transcript of a recording.

    Attributes:
        segments: one for each clip with speech, in order.
        seconds: of the recording.
    """

    segments: list[Segment]
    seconds: float


def clip_request(
    clip: RecordedClip | bytes, instruction: str, *, max_new_tokens: int, sampling: Sampling,
    adapter: str | None = None,
) -> Request:  # fmt: skip
    """Return the request that has a clip, of a recording or a file of its own, written down."""
    audio = clip if isinstance(clip, bytes) else (clip.samples, clip.rate)
    parts = [{"type": "audio", "audio": audio}, {"type": "text", "text": instruction}]
    messages = [{"role": "user", "content": parts}]
    return Request(messages, max_new_tokens=max_new_tokens, sampling=sampling, adapter=adapter)


@dataclass
class _Recording:
    """A recording that is being transcribed.

    Attributes:
        running: requests that are not yet answered.
        is_read: to its end.
    """

    segments: dict[int, Segment] = field(default_factory=dict)
    seconds: float = 0.0
    running: int = 0
    is_read: bool = False
    error: Exception | None = None


def transcribe(
    engine: Engine,
    sources: Sequence[AudioSource],
    request: Callable[[RecordedClip], Request],
    settings: CutSettings | None = None,
    progress: Callable[[float], None] = lambda seconds: None,
) -> Iterator[tuple[int, Transcript | Exception]]:
    """Transcribe recordings; their clips are read as the engine has room for them, of several recordings at a time.

    Args:
        sources: as of `load_audio`, however long.
        request: makes the request for a clip.
        progress: called with seconds of a recording that are transcribed, or have no speech.

    Yields:
        The recording's index in `sources`, and its transcript or what was wrong with it, as each comes to its end.
    """
    recordings = [_Recording() for _ in sources]
    requested: list[tuple[_Recording, int, RecordedClip | None]] = []

    def requests() -> Iterator[Request]:
        for source, recording in zip(sources, recordings, strict=True):
            try:
                for number, clip in enumerate(cut_recording(source, settings)):
                    recording.seconds = (clip.first + len(clip.samples)) / clip.rate
                    if clip.speech is None:
                        progress(clip.seconds)
                        continue
                    if recording.error is not None:
                        break
                    requested.append((recording, number, clip))
                    recording.running += 1
                    yield request(clip)
            except (InputError, OSError) as error:
                recording.error = error
            recording.is_read = True

    yielded: set[int] = set()

    def finished() -> Iterator[tuple[int, Transcript | Exception]]:
        for place, recording in enumerate(recordings):
            if recording.is_read and not recording.running and place not in yielded:
                yielded.add(place)
                segments = [recording.segments[number] for number in sorted(recording.segments)]
                yield place, recording.error or Transcript(segments, recording.seconds)
                recording.segments.clear()

    for index, completion in engine.run(requests()):
        recording, number, clip = requested[index]
        requested[index] = recording, number, None  # its samples are not needed any more
        assert clip is not None
        assert clip.speech is not None
        recording.running -= 1
        progress(clip.seconds)
        if completion.error is not None:
            recording.error = recording.error or InputError(completion.error)
        else:
            recording.segments[number] = Segment.of(*clip.speech, completion)
        yield from finished()
    yield from finished()
