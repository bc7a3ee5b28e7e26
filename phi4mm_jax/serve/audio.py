"""/v1/audio/transcriptions and /v1/audio/translations."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from secrets import randbelow
from typing import Annotated, Any, Literal

from fastapi import UploadFile
from pydantic import Field, WithJsonSchema

from phi4mm_jax.engine import Completion, Request, Sampling, Update
from phi4mm_jax.processing.recordings import RecordedClip, cut_recording
from phi4mm_jax.serve.answering import Events, Job, Service, Updates, completions_of, in_thread
from phi4mm_jax.serve.chat import token_logprobs
from phi4mm_jax.serve.errors import ApiError
from phi4mm_jax.serve.models import (
    AdapterName,
    FormModel,
    MinP,
    Positive,
    RepetitionPenalty,
    Seconds,
    Temperature,
    TopK,
    TopP,
    Word,
)
from phi4mm_jax.transcription.recognition import clip_request
from phi4mm_jax.transcription.transcripts import (
    LANGUAGES,
    Segment,
    Task,
    joined,
    plain_text,
    separator,
    srt,
    verbose,
    vtt,
)

Format = Literal["json", "text", "srt", "verbose_json", "vtt"]
_Nothing = Annotated[float, Field(ge=0, le=0)]
Language = Annotated[str, WithJsonSchema({"enum": list(LANGUAGES)})]


class TranslationForm(FormModel):
    file: UploadFile = Field(description="an audio file")
    model: str | None = Field(None, description="by default the server's own; or a user's adapter")
    prompt: str = Field("", max_length=0)
    response_format: Format = Field("json", description="json and text may be streamed")
    temperature: Temperature = 0.0
    top_p: TopP = 1.0
    top_k: TopK = 0
    min_p: MinP = 0.0
    repetition_penalty: RepetitionPenalty = 1.0
    seed: Word | None = Field(None, description="by default another one in each request")
    max_completion_tokens: Positive | None = Field(None, description="of each clip of a recording")
    adapter: AdapterName | None = Field(None, description="by default that of clips")
    stream: bool = False
    timeout: Seconds | None = Field(None, description="that the request may take")
    presence_penalty: _Nothing = 0
    frequency_penalty: _Nothing = 0

    @property
    def sampling(self) -> Sampling:
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        return Sampling(**{name: getattr(self, name) for name in names})


class TranscriptionForm(TranslationForm):
    language: Language | None = Field(None, description="for verbose_json: the model finds out")
    include: list[Literal["logprobs"]] = Field([], alias="include[]", description="of json")
    timestamp_granularities: list[Literal["segment"]] = Field(
        [], alias="timestamp_granularities[]", description="of words there are none"
    )
    chunking_strategy: Literal["auto"] | None = Field(None, description="has no effect: long clips are always cut")


@dataclass(frozen=True, kw_only=True)
class AudioJob(Job):
    """A recording to be written down, parsed: a request for each of its clips with speech.

    Attributes:
        seconds: of the recording.
        spans: where speech begins and ends in each clip, in seconds.
        language: as `verbose_json` names it; the model finds out itself.
    """

    task: Task
    seconds: float
    spans: list[tuple[float, float]]
    form: Format
    language: str | None
    temperature: float


async def parse_audio(
    service: Service, task: Task, form: TranslationForm | TranscriptionForm, instruction: str
) -> AudioJob:
    """Return what the fields of a form ask for.

    Raises:
        ApiError: a field is out of range, or the clip is none, or too long.
    """
    service.check_model(form.model)
    adapter, kind = service.adapter_of(form.model, form.adapter), form.response_format
    language, logprobs = (form.language, bool(form.include)) if isinstance(form, TranscriptionForm) else (None, False)
    if form.stream and kind not in ("json", "text"):
        raise ApiError(400, f"stream is true, but {kind} is not streamed; use json", param="stream")
    if logprobs and kind != "json":
        raise ApiError(400, f"include asks for logprobs, which only json has, not {kind}", param="include[]")
    if language is not None and language not in LANGUAGES:
        raise ApiError(
            400, f"language is {language!r:.60}; the model understands {', '.join(LANGUAGES)}", param="language"
        )
    deadline, content = service.deadline(form.timeout), await form.file.read()
    plain, seed = form.sampling, form.seed

    def parse() -> tuple[list[Request], list[tuple[float, float]], float]:
        seconds = service.read_media.audio("file", content)
        clips = _clips(service, content, seconds)
        limit = form.max_completion_tokens or service.limits.max_new_tokens
        requests = [
            clip_request(
                clip, instruction, max_new_tokens=limit, adapter=adapter,
                sampling=replace(plain, seed=randbelow(2**31) if seed is None else seed, stream=place),
            )
            for place, (clip, _) in enumerate(clips)
        ]  # fmt: skip
        return requests, [span for _, span in clips], seconds

    requests, spans, seconds = await in_thread(service, parse, deadline)
    spoken = "english" if task == "translate" else None if language is None else LANGUAGES[language]
    return AudioJob(
        requests=requests, deadline=deadline, logprobs=logprobs, parallel=service.queue.size, task=task,
        seconds=seconds, spans=spans, form=kind, language=spoken, temperature=form.temperature,
    )  # fmt: skip


def _clips(service: Service, content: bytes, seconds: float) -> list[tuple[RecordedClip | bytes, tuple[float, float]]]:
    """Return the clips of a recording with the times of speech in them: itself where it is one, else cut at silence."""
    settings = service.limits.cut
    if seconds <= settings.clip_seconds:
        return [(content, (0.0, seconds))]
    return [(clip, clip.speech) for clip in cut_recording(content, settings) if clip.speech is not None]


async def audio_answer(service: Service, client: str, job: AudioJob) -> dict[str, Any] | str:
    """Return the whole answer: an object, or the text of a format that is none.

    Raises:
        ApiError: as `answering`.
    """
    completions = await completions_of(service, client, job)
    segments = segments_of(job, completions)
    match job.form:
        case "text":
            return plain_text(segments)
        case "srt":
            return srt(segments)
        case "vtt":
            return vtt(segments)
        case "verbose_json":
            report = verbose(
                segments, task=job.task, language=job.language, seconds=job.seconds, temperature=job.temperature
            )
            return report | {"usage": _usage(completions)}
    answer: dict[str, Any] = {"text": joined(segments), "usage": _usage(completions)}
    if job.logprobs:
        answer["logprobs"] = _logprobs(service, completions)
    return answer


def segments_of(job: AudioJob, completions: Sequence[Completion]) -> list[Segment]:
    """Return the segments of a recording: one for each clip, as the model tells no times within."""
    return [Segment.of(*span, completion) for span, completion in zip(job.spans, completions, strict=True)]


async def audio_chunks(service: Service, job: AudioJob, updates: Updates) -> Events:
    """Yield the objects of a streamed transcript: of one clip token by token, of several each as it is answered."""

    def delta(text: str, found: Completion | Update) -> dict[str, Any]:
        event: dict[str, Any] = {"type": "transcript.text.delta", "delta": text}
        return event | {"logprobs": _logprobs(service, [found])} if job.logprobs else event

    ended: dict[int, Completion] = {}
    sent, text = 0, ""
    async for place, update in updates:
        if len(job.requests) == 1 and update.text:
            yield [delta(update.text, update)]
        if update.completion is not None:
            ended[place] = update.completion
        while sent in ended:  # in the order of the recording
            said = ended[sent].text.strip() if len(job.requests) > 1 else ended[sent].text
            piece = separator(text, said) + said
            text += piece
            if piece and len(job.requests) > 1:
                yield [delta(piece, ended[sent])]
            sent += 1
    completions = [ended[place] for place in sorted(ended)]
    event: dict[str, Any] = {"type": "transcript.text.done", "text": text, "usage": _usage(completions)}
    yield [event | {"logprobs": _logprobs(service, completions)} if job.logprobs else event]


def _logprobs(service: Service, found: Sequence[Completion | Update]) -> list[dict[str, Any]]:
    named = [token for one in found for token in token_logprobs(service.tokenizer, one)]
    return [{key: value for key, value in token.items() if key != "top_logprobs"} for token in named]


def _usage(completions: Sequence[Completion]) -> dict[str, Any]:
    prompt = sum(completion.prompt_tokens for completion in completions)
    count = sum(len(completion.tokens) for completion in completions)
    return {"type": "tokens", "input_tokens": prompt, "output_tokens": count, "total_tokens": prompt + count}
