"""/v1/completions."""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from phi4mm_jax.engine import Completion, Request, Update
from phi4mm_jax.engine.answer_lines import usage_of
from phi4mm_jax.engine.jsonl import request_of
from phi4mm_jax.engine.openai_batch import keys_of_body
from phi4mm_jax.processing.tokenizer import Tokenizer
from phi4mm_jax.serve.answering import Events, Job, Service, Updates, completions_of, in_thread
from phi4mm_jax.serve.chat import OURS, adapter_of, beams_of, check_sampling_options, check_top_logprobs, choices
from phi4mm_jax.serve.errors import ApiError
from phi4mm_jax.serve.files import new_id
from phi4mm_jax.serve.models import CompletionRequest

_OURS = OURS | {"logprobs", "echo", "prompt"}


@dataclass(frozen=True, kw_only=True)
class TextJob(Job):
    """Texts to complete, parsed; the requests are in the order of the prompts.

    Attributes:
        echoed: what each answer begins with.
        per_prompt: requests for each prompt.
    """

    echoed: list[str]
    per_prompt: int
    id: str = field(default_factory=partial(new_id, "cmpl"))


async def parse_completion(service: Service, body: CompletionRequest) -> TextJob:
    """Return what a body asks for.

    Raises:
        ApiError: a key is not supported, out of range, or beyond a limit.
    """
    values = body.model_dump(exclude_unset=True, exclude_none=True)
    count, beams = check_sampling_options(service, body), beams_of(service, body)
    prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    if not 1 <= len(prompts) <= service.limits.prompts:
        raise ApiError(
            400, f"prompt has {len(prompts)} texts; expected from 1 to {service.limits.prompts}", param="prompt"
        )
    if body.logprobs:
        check_top_logprobs(service, body.logprobs, True)
    if body.echo and body.logprobs is not None:
        raise ApiError(400, "echo is given with logprobs, but a prompt has none here; leave one out", param="echo")

    def parse() -> list[Request]:
        given = {key: value for key, value in values.items() if key not in _OURS}
        settings = {"max_new_tokens": service.limits.max_new_tokens}
        ours = adapter_of(service, body) | beams
        parsed = [keys_of_body({**given, "prompt": prompt}, "prompt") | ours for prompt in prompts]
        asked = [replace(request_of(keys, settings), top_logprobs=body.logprobs or 0) for keys in parsed]
        return [choice for request in asked for choice in choices(request, count)]

    deadline = service.deadline(body.timeout)
    requests = await in_thread(service, parse, deadline)
    echoed = [prompt if body.echo else "" for prompt in prompts for _ in range(count)]
    return TextJob(
        requests=requests, deadline=deadline, logprobs=body.logprobs is not None, include_usage=body.include_usage,
        model=body.model, echoed=echoed, per_prompt=len(requests) // len(prompts),
    )  # fmt: skip


async def text_answer(service: Service, client: str, job: TextJob, *, unlimited: bool = False) -> dict[str, Any]:
    """Return the whole answer.

    Raises:
        ApiError: as `answering`.
    """
    found, tokenizer = await completions_of(service, client, job, unlimited=unlimited), service.tokenizer
    answers = {  # by index, from which a grammar that allows fewer answers than beams leaves some out
        place * request.beams + i: answer
        for place, (request, completion) in enumerate(zip(job.requests, found, strict=True))
        for i, answer in enumerate(completion.answers(tokenizer))
    }
    return _head(service, job) | {
        "choices": [_choice(tokenizer, job, index, answer) for index, answer in answers.items()],
        "usage": _usage(job, [c.prompt_tokens for c in found], sum(len(a.tokens) for a in answers.values())),
    }


def _head(service: Service, job: TextJob) -> dict[str, Any]:
    return {"id": job.id, "object": "text_completion", "created": job.created, "model": job.model or service.name}


def _usage(job: TextJob, prompt_tokens: list[int], count: int) -> dict[str, int]:
    return usage_of(sum(prompt_tokens[:: job.per_prompt]), count)


def _choice(tokenizer: Tokenizer, job: TextJob, place: int, completion: Completion) -> dict[str, Any]:
    logprobs = _logprobs(tokenizer, completion, 0) if job.logprobs else None
    text = job.echoed[place] + completion.text
    return {"index": place, "text": text, "logprobs": logprobs, "finish_reason": completion.finish_reason}


def _logprobs(tokenizer: Tokenizer, found: Completion | Update, offset: int) -> dict[str, Any]:
    """Return the form that texts have; `offset` is that of the first token in the text."""
    texts, offsets = [tokenizer.decode([token]) for token in found.tokens], []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    top = [{tokenizer.decode([token]): value for token, value in others} for others in found.top_logprobs]
    return {
        "tokens": texts, "token_logprobs": list(found.log_probabilities), "top_logprobs": top or None,
        "text_offset": offsets,
    }  # fmt: skip


async def text_chunks(service: Service, job: TextJob, updates: Updates) -> Events:
    """Yield the objects of streamed texts, one for each update."""
    head = _head(service, job) | ({"usage": None} if job.include_usage else {})
    count, offsets = 0, [0] * len(job.requests)
    prompt_tokens = [0] * len(job.requests)
    rest = list(job.echoed)
    async for place, update in updates:
        text, rest[place] = rest[place] + update.text, ""
        count += len(update.tokens)
        logprobs = None
        if job.logprobs and update.tokens:
            logprobs = _logprobs(service.tokenizer, update, offsets[place])
            offsets[place] = logprobs["text_offset"][-1] + len(logprobs["tokens"][-1])
        reason = None
        if update.completion is not None:
            prompt_tokens[place], reason = update.completion.prompt_tokens, update.completion.finish_reason
        yield [head | {"choices": [{"index": place, "text": text, "logprobs": logprobs, "finish_reason": reason}]}]
    if job.include_usage:
        yield [head | {"choices": [], "usage": _usage(job, prompt_tokens, count)}]
