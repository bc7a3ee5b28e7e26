"""A row never depends on its batch, and LongRoPE is exact wherever a row crosses its boundary."""

import jax
import numpy as np
import pytest
from helpers.cases import golden_cases, media_of
from helpers.marks import fast_are
from helpers.paths import TINY
from helpers.reference import uncached_logits
from scipy.special import log_softmax

from phi4mm_jax.adapters import index_of
from phi4mm_jax.batch import Batch

INPUTS = TINY / "inputs"


NAMES = ["vision", "speech_long", "text_long", "vision_speech", "speech_multi", "text", "short", "both"]
PLACES = np.random.default_rng(0).permutation(len(NAMES))


def mixed_rows():
    """Eight rows of all modalities; clips of 0.9 s and 43 s side by side."""
    cases = {c["name"]: c for c in golden_cases()}
    short = np.random.default_rng(0).standard_normal(14400).astype(np.float32) * 0.1, 16000  # 0.9 s
    rows = []
    for name in NAMES[:-2]:
        media = media_of(cases[name])
        rows.append((cases[name]["prompt"], media["images"][0], media["audios"][0]))
    rows.append(("<|user|><|audio_1|>What is said?<|end|><|assistant|>", [], [short]))
    rows.append(
        ("<|user|><|image_1|>Compare<|image_2|>with<|audio_1|><|end|><|assistant|>",
         [INPUTS / "image_2.png", INPUTS / "image_0.png"], [INPUTS / "audio_1.flac"])
    )  # fmt: skip
    return [rows[i] for i in PLACES]


@pytest.fixture(scope="module")
def tiny(scanned):
    """Layers in stacks: a third of the operations to compile."""
    return scanned


@pytest.fixture(scope="module")
def rows():
    return mixed_rows()


@pytest.fixture(scope="module")
def together(tiny, rows):
    """The rows as one batch, and its logits."""
    batch = tiny.process(*map(list, zip(*rows, strict=True)))
    assert set(batch.adapters.tolist()) == {0, 1, 2}
    return batch, np.asarray(tiny.logits(batch))


@pytest.mark.parametrize("name", fast_are(["text_long", "vision_speech", "short"], NAMES))
def test_logits_are_those_of_the_row_alone(tiny, rows, together, name):
    batch, logits = together
    place = [NAMES[i] for i in PLACES].index(name)
    alone = tiny.process(*([x] for x in rows[place]))
    length = alone.lengths[0]
    np.testing.assert_array_equal(batch.tokens[place, :length], alone.tokens[0, :length])
    difference = np.abs(logits[place, :length] - np.asarray(tiny.logits(alone))[0, :length]).max()
    print(f"{name}: largest difference of the row's logits from the row alone: {difference:.1e}")
    assert difference <= 1e-4


@pytest.mark.slow
def test_tokens_are_those_of_logits_without_a_cache(tiny, rows):
    """Compare with whole rows, whose logits are those of the row alone."""
    prompts, images, audios = map(list, zip(*rows, strict=True))
    found = tiny.generate(prompts, images, audios, max_new_tokens=12)
    batch = tiny.process(prompts, images, audios)
    assert [completion.prompt_tokens for completion in found] == batch.lengths.tolist()
    logits = uncached_logits(tiny, batch, [completion.tokens for completion in found])
    for of_row, completion in zip(logits, found, strict=True):
        assert len(completion.tokens) == 12 or completion.finish_reason == "stop"
        assert completion.tokens == of_row.argmax(-1).tolist()
        np.testing.assert_allclose(completion.log_probabilities, log_softmax(of_row, -1).max(-1), atol=1e-4)


@pytest.mark.slow
def test_padding_is_never_read(tiny, rows):
    """Whatever stands in the padding of the stacks changes nothing."""
    prompts, images, audios = map(list, zip(*rows, strict=True))
    batch = tiny.process(prompts, images, audios)
    frames, crops = batch.audio.frames.copy(), batch.images.crops.copy()
    for piece, first, last in zip(frames, batch.audio.first, batch.audio.last, strict=True):
        piece[:first], piece[last:] = 1e3, -1e3
    crops[~batch.images.patch_mask.any((1, 2))] = 50.0
    tokens = batch.tokens.copy()
    for row, length in zip(tokens, batch.lengths, strict=True):
        row[length:] = 5
    dirty = batch._replace(
        tokens=tokens, audio=batch.audio._replace(frames=frames), images=batch.images._replace(crops=crops)
    )
    clean, soiled = np.asarray(tiny.logits(batch)), np.asarray(tiny.logits(dirty))
    for i, length in enumerate(batch.lengths):
        np.testing.assert_array_equal(clean[i, :length], soiled[i, :length])


@pytest.mark.slow
def test_a_diverged_adapter_reaches_its_own_rows_only(tiny, rows, monkeypatch):
    batch = tiny.process(*map(list, zip(*rows, strict=True)))
    speech = jax.tree.map(lambda x: x * np.nan, tiny.variables["lora_speech"])
    clean = tiny.logits(batch)
    monkeypatch.setattr(tiny, "variables", tiny.variables | {"lora_speech": speech})
    diverged = tiny.logits(batch)
    for i, (adapter, length) in enumerate(zip(batch.adapters, batch.lengths, strict=True)):
        expected = np.full_like(clean[i, :length], np.nan) if adapter == index_of("speech") else clean[i, :length]
        np.testing.assert_array_equal(diverged[i, :length], expected)


def greedy_from_scratch(model, tokens, steps):
    """Each token from the whole sequence, without a cache."""
    tokens = list(tokens)
    start = len(tokens)
    for _ in range(steps):
        batch = Batch(
            tokens=np.asarray([tokens + [0] * (192 - len(tokens))], np.int32),
            lengths=np.asarray([len(tokens)], np.int32),
            adapters=np.zeros(1, np.int32),
            media=np.full((1, 192), -1, np.int32),
            images=None,
            audio=None,
        )
        tokens.append(int(np.argmax(np.asarray(model.logits(batch))[0, len(tokens) - 1])))
    return tokens[start:]


def test_longrope_crossing_at_different_times(tiny):
    """96 tokens here. Rows start far below, just below, at, just above and beyond it; some cross, one never does."""
    boundary, steps = tiny.config.decoder.rope.original_length, 24
    lengths = [40, boundary - 7, boundary - 1, boundary, boundary + 1, 120, boundary - 15]
    rng = np.random.default_rng(3)
    words = ["<|tag|>", "<|tool|>", "<|/tool|>", "<|tool_call|>", "<|system|>", "<|user|>", "<|assistant|>"]
    prompts = ["".join(rng.choice(words, length)) for length in lengths]  # a token each
    tokenizer = tiny.processor.tokenizer
    completions = tiny.generate(prompts, max_new_tokens=steps)
    assert [c.prompt_tokens for c in completions] == lengths
    for prompt, completion in zip(prompts, completions, strict=True):
        expected = greedy_from_scratch(tiny, tokenizer.encode(prompt, special=True), steps)
        assert completion.tokens == expected[: len(completion.tokens)]
        assert len(completion.tokens) == steps or completion.finish_reason == "stop"


@pytest.mark.slow
def test_longrope_crossing_with_media(tiny):
    """A row with audio is prefilled again with its features, next to one that does not cross."""
    prompts = ["<|user|><|audio_1|>" + "x " * n + "<|end|><|assistant|>" for n in (10, 3)]
    audios = [[INPUTS / "audio_1.flac"], [INPUTS / "audio_0.flac"]]
    together = tiny.generate(prompts, audios=audios, max_new_tokens=40)
    boundary = tiny.config.decoder.rope.original_length
    assert together[0].prompt_tokens < boundary < together[0].prompt_tokens + 40
    for prompt, audio, completion in zip(prompts, audios, together, strict=True):
        batch = tiny.process([prompt], audios=[audio])
        n, tokens = completion.prompt_tokens, list(completion.tokens)
        whole = np.zeros((1, 192), np.int32)
        media = np.full((1, 192), -1, np.int32)
        whole[0, :n], media[0, :n] = batch.tokens[0, :n], batch.media[0, :n]
        for i, token in enumerate(tokens):
            again = batch._replace(tokens=whole, media=media, lengths=np.asarray([n + i], np.int32))
            assert token == int(np.argmax(np.asarray(tiny.logits(again))[0, n + i - 1]))
            whole[0, n + i] = token
