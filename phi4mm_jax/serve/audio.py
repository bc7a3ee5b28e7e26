"""/v1/audio/transcriptions and /v1/audio/translations."""

import zlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from phi4mm_jax.engine import Completion, Request, Sampling, Update
from phi4mm_jax.serve.answering import Job, Service, Updates, completions_of, in_thread
from phi4mm_jax.serve.chat import token_logprobs
from phi4mm_jax.serve.errors import ApiError

TASKS = {"transcribe": "Transcribe the audio clip into text.", "translate": "Translate the audio to English."}
FORMATS = ("json", "text", "srt", "verbose_json", "vtt")
LANGUAGES = {
    "en": "english", "zh": "chinese", "de": "german", "fr": "french", "it": "italian", "ja": "japanese",
    "es": "spanish", "pt": "portuguese",
}  # fmt: skip

Task = Literal["transcribe", "translate"]


@dataclass(frozen=True, kw_only=True)
class AudioJob(Job):
    """A clip to be written down, parsed: one request.

    Attributes:
        seconds: of the clip.
        language: as `verbose_json` names it; the model finds out itself.
    """

    task: Task
    seconds: float
    form: str
    language: str | None


@dataclass(frozen=True)
class Segment:
    """A stretch of speech and what is said in it; the keys are those of `verbose_json`."""

    id: int
    seek: int
    start: float
    end: float
    text: str
    tokens: list[int]
    temperature: float
    avg_logprob: float | None
    compression_ratio: float
    no_speech_prob: float | None = None


async def parse_audio(
    service: Service, task: Task, content: bytes, *, instruction: str, form: str, language: str | None,
    temperature: float, timeout: float | None, logprobs: bool,
) -> AudioJob:  # fmt: skip
    """Return what the fields of a form ask for.

    Raises:
        ApiError: a field is out of range, or the clip is none, or too long.
    """
    if form not in FORMATS:
        raise ApiError(
            400, f"response_format is {form!r:.60}; expected one of {', '.join(FORMATS)}", param="response_format"
        )
    if logprobs and form != "json":
        raise ApiError(400, f"include asks for logprobs, which only json has, not {form}", param="include[]")
    if language is not None and language not in LANGUAGES:
        raise ApiError(
            400, f"language is {language!r:.60}; the model understands {', '.join(LANGUAGES)}", param="language"
        )
    deadline = service.deadline(timeout)

    def parse() -> tuple[Request, float]:
        seconds = service.read_media.audio("file", content)
        parts = [{"type": "audio", "audio": content}, {"type": "text", "text": instruction}]
        chat = [{"role": "user", "content": parts}]
        sampling = Sampling(temperature=temperature)
        return Request(chat, max_new_tokens=service.limits.max_new_tokens, sampling=sampling), seconds

    request, seconds = await in_thread(service, parse, deadline)
    spoken = "english" if task == "translate" else None if language is None else LANGUAGES[language]
    return AudioJob(
        requests=[request], deadline=deadline, logprobs=logprobs, task=task, seconds=seconds, form=form, language=spoken
    )


async def audio_answer(service: Service, client: str, job: AudioJob) -> dict[str, Any] | str:
    """Return the whole answer: an object, or the text of a format that is none.

    Raises:
        ApiError: as `answering`.
    """
    (completion,) = await completions_of(service, client, job)
    segments = segments_of(job, completion)
    text = completion.text.strip()
    match job.form:
        case "text":
            return text + "\n"
        case "srt":
            return srt(segments)
        case "vtt":
            return vtt(segments)
        case "verbose_json":
            return {
                "task": job.task, "language": job.language, "duration": job.seconds, "text": text,
                "segments": [asdict(segment) for segment in segments], "usage": _usage(job, completion),
            }  # fmt: skip
    answer = {"text": text, "usage": _usage(job, completion)}
    if job.logprobs:
        answer["logprobs"] = _logprobs(service, completion)
    return answer


def segments_of(job: AudioJob, completion: Completion) -> list[Segment]:
    """Return the segments of a clip: one, as the model tells no times within."""
    text, values = completion.text.strip(), completion.log_probabilities
    return [
        Segment(
            id=0, seek=0, start=0.0, end=job.seconds, text=text, tokens=completion.tokens,
            temperature=float(job.requests[0].sampling.temperature),
            avg_logprob=sum(values) / len(values) if values else None,
            compression_ratio=len(text.encode()) / len(zlib.compress(text.encode())),
        )
    ]  # fmt: skip


def srt(segments: Sequence[Segment]) -> str:
    """Return segments as SubRip has them."""
    blocks = [
        f"{i}\n{_clock(segment.start, ',')} --> {_clock(segment.end, ',')}\n{segment.text}\n"
        for i, segment in enumerate(segments, 1)
    ]
    return "\n".join(blocks)


def vtt(segments: Sequence[Segment]) -> str:
    """Return segments as WebVTT has them."""
    blocks = [f"{_clock(s.start, '.')} --> {_clock(s.end, '.')}\n{s.text}\n" for s in segments]
    return "\n".join(["WEBVTT\n", *blocks])


def _clock(seconds: float, point: str) -> str:
    total = round(1000 * seconds)
    return f"{total // 3_600_000:02}:{total // 60_000 % 60:02}:{total // 1000 % 60:02}{point}{total % 1000:03}"


async def audio_chunks(service: Service, job: AudioJob, updates: Updates) -> AsyncIterator[dict[str, Any]]:
    """Yield the objects of a streamed transcript."""
    async for _, update in updates:
        if update.text:
            event: dict[str, Any] = {"type": "transcript.text.delta", "delta": update.text}
            if job.logprobs:
                event["logprobs"] = _logprobs(service, update)
            yield event
        if (completion := update.completion) is not None:
            event = {"type": "transcript.text.done", "text": completion.text, "usage": _usage(job, completion)}
            if job.logprobs:
                event["logprobs"] = _logprobs(service, completion)
            yield event


def _logprobs(service: Service, found: Completion | Update) -> list[dict[str, Any]]:
    named = token_logprobs(service.tokenizer, found)
    return [{key: value for key, value in token.items() if key != "top_logprobs"} for token in named]


def _usage(job: AudioJob, completion: Completion) -> dict[str, Any]:
    count = len(completion.tokens)
    return {
        "type": "tokens", "input_tokens": completion.prompt_tokens, "output_tokens": count,
        "total_tokens": completion.prompt_tokens + count,
    }  # fmt: skip
