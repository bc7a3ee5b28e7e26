"""Steps are dispatched before the results of earlier ones are read; the answers are those of the model all the same."""

from concurrent.futures import wait

import numpy as np
import pytest
from helpers.reference import uncached_logits

from phi4mm_jax.engine import EngineConfig, Request
from phi4mm_jax.engine.inputs import DeviceCopies

CONFIG = EngineConfig(slots=4, cache_tokens=64 * 6, page_size=64, chunk=256, steps=4)


def prompt_of(tokenizer, count, text):
    """A prompt of exactly this many tokens."""
    return text + "<|tag|>" * (count - len(tokenizer.encode(text, special=True)))


def recorded(monkeypatch, runner, call, value):
    """Values of the batches that a call is made with, at that time."""
    found, dispatch = [], getattr(runner, call)

    def record(batch):
        found.append(value(batch))
        return dispatch(batch)

    monkeypatch.setattr(runner, call, record)
    return found


def test_a_round_is_dispatched_before_the_last_one_is_read(tiny, monkeypatch):
    engine = tiny.engine(CONFIG)
    known = recorded(monkeypatch, engine.runner, "decode", lambda batch: len(batch.sequences[0].output_token_ids))
    ((_, answer),) = engine.run([Request("<|user|>Tell me<|end|><|assistant|>", max_new_tokens=13)])
    assert len(answer.tokens) == 13
    assert known == [0, 1, 5]  # of 1, 5 and 9 that are generated


@pytest.mark.parametrize("end", ["stop token", "stop string", "cancelled", "length"])
def test_pages_are_reused_while_a_dispatched_round_writes_to_them(tiny, monkeypatch, end):
    """Five of six pages are the first request's, and the last one takes its slot and a page once it has ended.

    Each answer is the greedy one of logits without a cache, also that of another that is decoded all the time.
    """
    tokenizer, engine = tiny.processor.tokenizer, tiny.engine(CONFIG)
    prompts = [prompt_of(tokenizer, n, text) for n, text in ((250, "seven stones"), (9, "the"), (140, "a small house"))]
    ((_, plain),) = engine.run([Request(prompts[0], max_new_tokens=12)])
    settings = {
        "stop token": {"stop_tokens": [plain.tokens[3]]}, "stop string": {"stop": [plain.text[2:5]]}, "cancelled": {},
        "length": {"max_new_tokens": 8},
    }[end]  # fmt: skip
    first = engine.submit(Request(prompts[0], **({"max_new_tokens": 60} | settings)))
    others = [engine.submit(Request(prompt, max_new_tokens=n)) for prompt, n in zip(prompts[1:], (50, 12), strict=True)]
    wait([waiting.processed for waiting in engine.queue._waiting])  # or else the second one might take the slot
    pending = [0]
    batches = recorded(
        monkeypatch, engine.runner, "prefill", lambda b: (b.sequences[0], [*b.sequences[0].pages], pending.copy())
    )
    updates = engine.step()
    sequence = engine.scheduler.slots[0]
    while not engine.idle:
        if end == "cancelled" and sequence.output_token_ids:
            engine.cancel(first)
        pending[:] = [sequence.num_pending_tokens]
        updates += engine.step()
    (_, written, _), (last, pages, unread) = batches[:1] + batches[-1:]
    assert last.slot == sequence.slot
    assert written[3] in pages  # partly filled by the prompt
    assert unread[0] > 0
    answers = {update.id: update.completion.tokens for update in updates if update.completion}
    assert 0 < len(answers[first]) < 12
    assert answers[first] == plain.tokens[: len(answers[first])]
    assert [token for update in updates if update.id == first for token in update.tokens] == answers[first]
    greedy = [plain.tokens, *(answers[other] for other in others)]
    logits = uncached_logits(tiny, tiny.process(prompts), greedy)
    assert [x.argmax(-1).tolist() for x in logits] == greedy
    assert engine.scheduler.allocator.num_unreserved == engine.config.pages


def test_only_changed_arrays_are_uploaded():
    uploaded = []

    def place(array):
        uploaded.append(array.tolist())
        return array.tolist()

    copies = DeviceCopies(place)
    for tables, settings in (([1, 2], [0.0]), ([1, 2], [0.0]), ([1, 3], [0.0]), ([1, 3], [0.5]), ([1, 2], [0.5])):
        found = copies.of({"tables": np.asarray(tables), "sampling": (np.asarray(settings), None)})
        assert found == {"tables": tables, "sampling": (settings, None)}
    assert uploaded == [[0.0], [1, 2], [1, 3], [0.5], [1, 2]]
