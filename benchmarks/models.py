"""Checkpoints of random weights, and rounds of our engine on them, which several benchmarks time."""

import dataclasses
import json
import lzma
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import phi4mm_jax
from benchmarks.paths import FIXTURES, RELEASE, TINY
from phi4mm_jax.checkpoint.random import write_random_checkpoint
from phi4mm_jax.config import RELEASE_TOWER
from phi4mm_jax.engine import EngineConfig, Request
from phi4mm_jax.processing.batching import Row

STEPS = 8  # tokens decoded at once
Timed = Callable[[], float]  # seconds of one call


def timed(function: Callable[[], Any]) -> Timed:
    def call() -> float:
        start = time.perf_counter()
        jax.block_until_ready(function())
        return time.perf_counter() - start

    return call


def wide_checkpoint(folder: str, whole_encoders: bool = False) -> Path:
    """Write random weights of the release's widths and vocabulary, two layers of each stack or of the decoder alone."""
    config = json.loads(RELEASE.read_text())
    config["num_hidden_layers"] = 2
    config["img_processor"] = {**RELEASE_TOWER}  # its last layer is not used
    if not whole_encoders:
        config["audio_processor"]["config"]["num_blocks"] = 2
        config["img_processor"]["num_hidden_layers"] = 3
    work = Path(folder)
    (work / "config.json").write_text(json.dumps(config))
    (work / "tokenizer.json").write_text(json.dumps(whole_tokenizer()))
    (work / "tokenizer_config.json").write_text(json.dumps({"model_max_length": config["max_position_embeddings"]}))
    shutil.copy(TINY / "preprocessor_config.json", work)
    write_random_checkpoint(work / "config.json", work / "checkpoint", work, shard_bytes=1 << 30)
    return work / "checkpoint"


def whole_tokenizer() -> dict[str, Any]:
    """Return tokenizer.json without gaps among its ids, for which transformers would number special tokens anew."""
    tokenizer = json.loads(lzma.decompress((FIXTURES / "o200k" / "tokenizer.json.xz").read_bytes()))
    added = {token["id"]: token for token in tokenizer["added_tokens"]}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    for number in set(range(len(tokenizer["model"]["vocab"]), max(added))) - set(added):
        added[number] = {"id": number, "content": f"<|dummy_{number}|>", **flags}
    return tokenizer | {"added_tokens": [added[number] for number in sorted(added)]}


def small_checkpoint(folder: str) -> Path:
    """Copy the tests' checkpoint, with LongRoPE's boundary out of reach: transformers chooses one set for a batch."""
    checkpoint = Path(shutil.copytree(TINY, Path(folder) / "checkpoint"))
    config = json.loads((checkpoint / "config.json").read_text())
    config |= {"original_max_position_embeddings": 4096, "max_position_embeddings": 131072}
    (checkpoint / "config.json").write_text(json.dumps(config))
    return checkpoint


def endless(model: phi4mm_jax.Model) -> phi4mm_jax.Model:
    """Return a model whose answers no token stops."""
    config = dataclasses.replace(model.config, stop_token_ids=())
    return phi4mm_jax.Model(model.module.clone(config=config), model.variables, model.processor)


def random_row(random: np.random.Generator, length: int) -> Row:
    """Return a row of random ordinary tokens."""
    return Row(random.integers(0, 500, length).astype(np.int32), (), (), ())


def decoding(model: phi4mm_jax.Model, rows: Sequence[Row]) -> Timed:
    """Return a call that takes the seconds of a round of `STEPS` tokens of each row."""
    count, tokens = len(rows), sum(len(row.tokens) + 512 for row in rows)
    engine = model.engine(EngineConfig(slots=count, cache_tokens=2 * tokens, steps=STEPS))
    numbers = [engine.submit(Request("", max_new_tokens=500), row) for row in rows]
    for _ in range(count + 2):  # all are prefilled, and decode
        engine.updates_of(numbers)

    def call() -> float:
        jax.block_until_ready(engine.runner.kv_cache)  # each round dispatches the next, so one is there already
        start = time.perf_counter()
        made = sum(len(update.tokens) for _ in range(4) for update in engine.updates_of(numbers))
        seconds = time.perf_counter() - start
        if made != 4 * count * STEPS:
            raise SystemExit(f"decoding: four rounds made {made} tokens, not {4 * count * STEPS}")
        jax.block_until_ready(engine.runner.kv_cache)  # or else the next side would be timed beside it
        return seconds / 3

    return call
