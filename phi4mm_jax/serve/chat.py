"""/v1/chat/completions."""

from dataclasses import dataclass, field, replace
from functools import partial
from secrets import randbelow
from typing import Any

from phi4mm_jax.engine import Completion, Request, Update
from phi4mm_jax.engine.answer_lines import chat_message, usage_of
from phi4mm_jax.engine.jsonl import request_of
from phi4mm_jax.engine.openai_batch import keys_of_body
from phi4mm_jax.engine.tool_calls import BEGIN, without_special
from phi4mm_jax.processing.tokenizer import Tokenizer
from phi4mm_jax.serve.answering import Events, Job, Service, Updates, completions_of, in_thread
from phi4mm_jax.serve.errors import ApiError
from phi4mm_jax.serve.files import new_id
from phi4mm_jax.serve.models import ChatRequest, SamplingOptions

OURS = {  # not of the parser
    "model", "n", "stream", "stream_options", "adapter", "timeout", "use_beam_search", "length_penalty"
}  # fmt: skip
_OURS = OURS | {"top_logprobs"}


@dataclass(frozen=True, kw_only=True)
class ChatJob(Job):
    """A chat, parsed."""

    id: str = field(default_factory=partial(new_id, "chatcmpl"))


async def parse_chat(service: Service, body: ChatRequest) -> ChatJob:
    """Return what a body asks for, its media read.

    Raises:
        ApiError: a key is not supported, out of range, or beyond a limit.
    """
    values = body.model_dump(exclude_unset=True, exclude_none=True)
    count, beams = check_sampling_options(service, body), beams_of(service, body)
    if body.top_logprobs:
        check_top_logprobs(service, body.top_logprobs, bool(body.logprobs))

    def parse() -> Request:
        parsed = keys_of_body({key: value for key, value in values.items() if key not in _OURS}, "messages")
        parsed["messages"] = service.read_media(parsed["messages"])
        parsed |= adapter_of(service, body) | beams
        request = request_of(parsed, {"max_new_tokens": service.limits.max_new_tokens})
        return replace(request, top_logprobs=body.top_logprobs or 0)

    deadline = service.deadline(body.timeout)
    request = await in_thread(service, parse, deadline)
    return ChatJob(
        requests=choices(request, count), deadline=deadline, logprobs=bool(body.logprobs),
        include_usage=body.include_usage, model=body.model,
    )  # fmt: skip


def check_sampling_options(service: Service, body: SamplingOptions) -> int:
    """Check what chats and texts share; return how many answers are asked for.

    Raises:
        ApiError: an unknown model, or a value out of range.
    """
    service.check_model(body.model)
    count = 1 if body.n is None else body.n
    if not 1 <= count <= service.limits.choices:
        raise ApiError(400, f"n is {count}; expected a whole number from 1 to {service.limits.choices}", param="n")
    if body.draft is not None and not service.limits.draft_tokens:
        raise ApiError(400, f"draft is {body.draft!r}, but this server guesses none (--draft-tokens); leave it out",
                       param="draft")  # fmt: skip
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options is given without stream; leave it out", param="stream_options")
    return count


def beams_of(service: Service, body: SamplingOptions) -> dict[str, Any]:
    """Return the keys of a beam search as vLLM asks for one, by as many beams as answers.

    Raises:
        ApiError: with `stream`, a single answer or too many, or `length_penalty` without it.
    """
    if not body.use_beam_search:
        if body.length_penalty is not None:
            raise ApiError(
                400, "length_penalty is given without use_beam_search, which alone has it; set it as well, or leave "
                "both out", param="length_penalty",
            )  # fmt: skip
        return {}
    if body.stream:
        raise ApiError(
            400, "stream is true with use_beam_search, whose answers are known only at the end; leave one out",
            param="stream",
        )  # fmt: skip
    if body.n in (None, 1):
        raise ApiError(400, "n is 1 with use_beam_search, which has as many beams as answers; ask for more", param="n")
    if body.n > service.limits.beams:
        raise ApiError(
            400, f"n is {body.n} with use_beam_search; this server has at most {service.limits.beams} beams (--beams)",
            param="n",
        )  # fmt: skip
    return {"beams": body.n, "length_penalty": body.length_penalty}


def check_top_logprobs(service: Service, count: int, logprobs: bool) -> None:
    """Raise ApiError for alternatives of tokens that are too many, or that nobody sees."""
    max_count = service.limits.top_logprobs
    if not 0 < count <= max_count:
        raise ApiError(
            400, f"top_logprobs is {count}; this server gives at most {max_count} (--top-logprobs)",
            param="top_logprobs",
        )  # fmt: skip
    if not logprobs:
        raise ApiError(400, "top_logprobs is given without logprobs; set it as well", param="top_logprobs")


def adapter_of(service: Service, body: SamplingOptions) -> dict[str, str]:
    """Return the key of the adapters that a body asks for, by its model and by `adapter`."""
    adapter = service.adapter_of(body.model, body.adapter)
    return {} if adapter is None else {"adapter": adapter}


def choices(request: Request, count: int) -> list[Request]:
    """Return requests for so many answers to the same prompt, each with draws of its own; one for all beams."""
    if request.beams > 1:
        return [request]
    sampling = request.sampling
    if sampling.seed is None:
        return [replace(request, sampling=replace(sampling, seed=randbelow(2**31))) for _ in range(count)]
    return [replace(request, sampling=replace(sampling, stream=i)) for i in range(count)]


async def chat_answer(service: Service, client: str, job: ChatJob, *, unlimited: bool = False) -> dict[str, Any]:
    """Return the whole answer.

    Raises:
        ApiError: as `answering`.
    """
    answered = await completions_of(service, client, job, unlimited=unlimited)
    found = [answer for completion in answered for answer in completion.answers(service.tokenizer)]
    return {
        "id": job.id, "object": "chat.completion", "created": job.created, "model": job.model or service.name,
        "choices": [_choice(service.tokenizer, job, i, completion) for i, completion in enumerate(found)],
        "usage": usage_of(found[0].prompt_tokens, sum(len(completion.tokens) for completion in found)),
    }  # fmt: skip


def _choice(tokenizer: Tokenizer, job: ChatJob, place: int, completion: Completion) -> dict[str, Any]:
    message, reason = chat_message(completion, f"{job.id.removeprefix('chatcmpl-')}_{place}")
    logprobs = None
    if job.logprobs:
        logprobs = {"content": token_logprobs(tokenizer, completion)}
    return {"index": place, "message": message, "logprobs": logprobs, "finish_reason": reason}


def token_logprobs(tokenizer: Tokenizer, found: Completion | Update) -> list[dict[str, Any]]:
    """Return tokens and their log-probabilities in the form of chats."""
    return [
        _named(tokenizer, token, value) | {"top_logprobs": [_named(tokenizer, *other) for other in top]}
        for token, value, top in zip(
            found.tokens, found.log_probabilities, found.top_logprobs or [()] * len(found.tokens), strict=True
        )
    ]


def _named(tokenizer: Tokenizer, token: int, log_probability: float) -> dict[str, Any]:
    """Return a token with its text and bytes."""
    content = tokenizer.decode_bytes([token])
    return {"token": content.decode(errors="replace"), "logprob": log_probability, "bytes": list(content)}


async def chat_chunks(service: Service, job: ChatJob, updates: Updates) -> Events:
    """Yield the objects of a streamed chat, those of each update together."""
    head = {"id": job.id, "object": "chat.completion.chunk", "created": job.created, "model": job.model or service.name}
    usage = {"usage": None} if job.include_usage else {}

    def chunk(place: int, delta: dict[str, Any], reason: str | None = None, logprobs: Any = None) -> dict[str, Any]:
        choice = {"index": place, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return head | {"choices": [choice]} | usage

    streams = [_ContentStream(service.tokenizer, request.skip_special_tokens) for request in job.requests]
    begun: set[int] = set()
    prompt_tokens = 0
    async for place, update in updates:
        chunks: list[dict[str, Any]] = []
        if place not in begun:
            begun.add(place)
            chunks.append(chunk(place, {"role": "assistant", "content": ""}))
        text = streams[place].add(update)
        logprobs = None
        if job.logprobs and update.tokens:
            logprobs = {"content": token_logprobs(service.tokenizer, update)}
        if text or logprobs is not None:
            chunks.append(chunk(place, {"content": text}, logprobs=logprobs))
        if (completion := update.completion) is not None:
            prompt_tokens = completion.prompt_tokens
            message, reason = chat_message(completion, f"{job.id.removeprefix('chatcmpl-')}_{place}")
            for i, call in enumerate(message.get("tool_calls", [])):
                chunks.append(chunk(place, {"tool_calls": [{"index": i, **call}]}))
            chunks.append(chunk(place, {}, reason))
        if chunks:
            yield chunks
    if job.include_usage:
        count = sum(stream.num_tokens for stream in streams)
        yield [head | {"choices": [], "usage": usage_of(prompt_tokens, count)}]


class _ContentStream:
    """Content of an answer as it comes: its text, but for tool calls, from whose beginning on it waits for the end."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool):
        self._skip_special = skip_special
        self._tokenizer, self._mark = tokenizer, tokenizer.special_tokens.get(BEGIN)
        self._tokens: list[int] = []
        self._text = ""
        self._sent = 0
        self._stop: int | None = None  # where the first call begins

    @property
    def num_tokens(self) -> int:
        return len(self._tokens)

    def add(self, update: Update) -> str:
        self._tokens += update.tokens
        self._text += update.text
        text = self._text
        if update.completion is not None:
            text = update.completion.content
        elif self._stop is None and self._mark in update.tokens:
            before = self._tokens[: self._tokens.index(self._mark)]
            before = without_special(before, self._tokenizer) if self._skip_special else before
            self._stop = len(self._tokenizer.decode(before))
        if update.completion is None and self._stop is not None:
            text = text[: self._stop]
        piece, self._sent = text[self._sent :], max(self._sent, len(text))
        return piece
