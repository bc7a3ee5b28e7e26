"""Decoding with drafts beside decoding without: python -m benchmarks.drafts.

The small model reads the pictures of its held-out set, copies words, and continues lines that repeat. For each set:
tokens a step with drafts (without, one), tokens a second with and without in rounds that alternate, and how many
answers are the same.

With --random N it answers N random requests instead, greedy and sampled, once without drafts and once with them, and
prints how many answers differ; the exit status is 1 if any does. Those with drafts come in groups of random sizes, so
that rounds are dispatched ahead, and in turn where requests wait for a slot.
"""

import argparse
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console
from rich.table import Table

import phi4mm_jax
from benchmarks.machine import processor
from benchmarks.paths import HELD, SMALL_MODEL
from phi4mm_jax.engine import Completion, Engine, EngineConfig, Request, Sampling
from phi4mm_jax.evaluation.items import read_items

WORDS = ["apple", "bank", "bell", "bird", "boat", "book", "bread", "brick", "cake", "candle", "cat", "chair", "clock"]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.drafts", description="Decoding with drafts.")
    parser.add_argument("--model", metavar="PATH", default=str(SMALL_MODEL))
    parser.add_argument("--slots", metavar="N", type=int, nargs="+", default=[1, 8], help="a table's rows for each")
    parser.add_argument("--draft-tokens", metavar="N", type=int, default=5)
    parser.add_argument("--rounds", metavar="N", type=int, default=3, help="after a first one; the median counts")
    parser.add_argument("--random", metavar="N", type=int, help="compare the answers to so many random requests")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of the random requests")
    arguments = parser.parse_args()
    model = phi4mm_jax.load(arguments.model, dtype="float32")
    if arguments.random is not None:
        asked = random_requests(arguments.random, arguments.seed)
        return compare(model, asked, arguments.slots[-1], arguments.draft_tokens, arguments.seed)
    table = Table("set", "slots", "tokens", "tokens a step", "tokens/s without", "with", "ratio", "same answers")
    for name, requests in sets().items():
        for slots in arguments.slots:
            table.add_row(name, str(slots), *measured(model, requests, slots, arguments.draft_tokens, arguments.rounds))
    console = Console(width=120)
    console.print(f"{processor()}, up to {arguments.draft_tokens} tokens a draft")
    console.print(table)
    return 0


def sets() -> dict[str, list[Request]]:
    pictures = [Request(item.prompt, max_new_tokens=64) for item in read_items(HELD / "ocr.jsonl")]
    draw = random.Random(0)
    words = [" ".join(draw.choices(WORDS, k=4)) for _ in range(64)]
    copies = [Request([{"role": "user", "content": f"copy {text}"}], max_new_tokens=64) for text in words]
    lines = [Request(f"{text}\n" * 3, max_new_tokens=64) for text in words]
    return {"read pictures": pictures, "copy words": copies, "repeated lines": lines}


def random_requests(count: int, seed: int) -> list[Request]:
    """Draw requests, half greedy, half sampled; four of five with drafts, and most of words that repeat."""
    draw = random.Random(seed)

    def request(place: int) -> Request:
        words = draw.choices(WORDS, k=draw.randint(2, 6))
        text = " ".join(words * draw.randint(2, 4) if draw.random() < 0.7 else draw.choices(WORDS, k=8))
        penalty = draw.choice([1.0, 1.0, 1.1, 1.3])
        sampling = Sampling(repetition_penalty=penalty)
        if place % 2:
            sampling = Sampling(
                draw.uniform(0.2, 1.2), draw.choice([0, 3, 20]), draw.choice([1.0, 0.9, 0.6]), draw.choice([0.0, 0.05]),
                penalty, seed=place,
            )  # fmt: skip
        return Request(
            text if draw.random() < 0.5 else [{"role": "user", "content": f"copy {text}"}],
            max_new_tokens=draw.randint(1, 24), sampling=sampling, draft="lookup" if draw.random() < 0.8 else None,
        )  # fmt: skip

    return [request(place) for place in range(count)]


def compare(model: phi4mm_jax.Model, requests: Sequence[Request], slots: int, max_draft: int, seed: int) -> int:
    """Print how many answers differ with and without drafts; return the exit status."""
    plain = model.engine(EngineConfig(slots=slots))
    drafted = model.engine(EngineConfig(slots=slots, draft_tokens=max_draft))
    before, seconds = answers(plain, [replace(request, draft=None) for request in requests])
    draw, after, drafted_seconds = random.Random(seed), [], 0.0
    while len(after) < len(requests):
        found, taken = answers(drafted, requests[len(after) : len(after) + draw.randint(1, 3 * slots)])
        after, drafted_seconds = [*after, *found], drafted_seconds + taken
    differ = [
        place
        for place, (one, other) in enumerate(zip(before, after, strict=True))
        if (one.error, one.tokens, one.finish_reason) != (other.error, other.tokens, other.finish_reason)
    ]
    steps, tokens = drafted.runner.num_draft_steps, drafted.runner.num_draft_step_tokens
    print(f"{processor()}, {slots} slots, up to {max_draft} tokens a draft")
    print(
        f"{len(requests)} requests, {sum(len(answer.tokens) for answer in before)} tokens: {len(differ)} answers differ"
        f"{f', the first to request {differ[0]}' if differ else ''}; those with drafts took {steps} steps for {tokens} "
        f"tokens, {tokens / max(steps, 1):.2f} a step"
    )
    print(f"{drafted_seconds:.0f} s with drafts, {seconds:.0f} s without, each with its compilation")
    return 1 if differ else 0


def measured(model: phi4mm_jax.Model, requests: Sequence[Request], slots: int, max_draft: int, rounds: int):
    """Return the cells of a row, from the tokens on."""
    plain = model.engine(EngineConfig(slots=slots))
    drafted = model.engine(EngineConfig(slots=slots, draft_tokens=max_draft))
    with_drafts = [replace(request, draft="lookup") for request in requests]
    before, after = answers(plain, requests)[0], answers(drafted, with_drafts)[0]  # and all is compiled
    seconds = [(answers(plain, requests)[1], answers(drafted, with_drafts)[1]) for _ in range(rounds)]
    tokens = sum(len(answer.tokens) for answer in before)
    rates = [tokens / statistics.median(times) for times in zip(*seconds, strict=True)]
    per_step = drafted.runner.num_draft_step_tokens / drafted.runner.num_draft_steps
    same = sum(one.tokens == other.tokens for one, other in zip(before, after, strict=True))
    cells = str(tokens), f"{per_step:.2f}", *(f"{rate:.0f}" for rate in rates), f"{rates[1] / rates[0]:.2f}"
    return *cells, f"{same} of {len(before)}"


def answers(engine: Engine, requests: Sequence[Request]) -> tuple[list[Completion], float]:
    """Return the answers in order, and the seconds that they took."""
    start = time.perf_counter()
    found = dict(engine.run(requests))
    return [found[i] for i in range(len(found))], time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
