"""Train an encoder to recognise letters, before there is a trained decoder.

    python -m train.tiny.letters pages|clips START DATA DESTINATION

Each place of a page is classified by its cell, each clip by connectionist temporal classification (Graves et
al., 2006). The classes are the first dimensions of the projector's output, so that `train.tiny.join` can put the
decoder's own embeddings in their place: the decoder then sees media as the text that it has learnt to read.

DESTINATION gets encoder.npz and metrics.jsonl.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Int

import phi4mm_jax
from phi4mm_jax.batch import AudioStack, ImageStack
from phi4mm_jax.processing.audio import load_audio
from phi4mm_jax.processing.audio_features import log_mel, num_audio_tokens
from phi4mm_jax.processing.batching import clip_chunks
from phi4mm_jax.processing.images import load_image, preprocess_image
from phi4mm_jax.training.metrics_log import MetricsLog
from phi4mm_jax.training.param_filter import join, split
from phi4mm_jax.utils.cli import cli_entrypoint, make_parser
from phi4mm_jax.utils.paths import path_argument
from train.tiny import content, pictures

PAGE_CLASSES = content.BLANK + content.ROW_END + content.GLOBAL + content.BAR + content.LETTERS + content.DIGITS
CLIP_CLASSES = content.PAUSE + content.BLANK + content.LETTERS  # the first is what CTC calls its blank
ENCODERS = {
    "pages": ("params/vision", "params/image_embedder"),
    "clips": ("params/speech", "!params/speech/mean", "!params/speech/inverse_deviation", "params/audio_projector"),
}
_SHARPNESS = 10.0  # logits of classes whose outputs lie between 0 and 1
_POOL, _NEW, _CROPS = 2500, 6, 64  # pages that are kept, that are drawn anew at each step, and crops of a step
_CLIPS = 32  # of a step
_LENGTHS = (24, 36, 48, 72)  # of batches of clips, in tokens

Batch = Any
Clip = tuple[np.ndarray, list[int]]
Metrics = dict[str, Array]
Loss = Callable[[Callable[..., Any], Any, Batch], tuple[Array, Metrics]]


def page_loss(
    apply: Callable[..., Any], variables: Any, batch: tuple[ImageStack, Int[Array, "M"]]
) -> tuple[Array, Metrics]:
    """Return the cross-entropy by place, and the squared distance from the class's own dimension."""
    images, targets = batch
    outputs = apply(variables, images, method="encode_images")[:, : len(PAGE_CLASSES)]  # (M, classes)
    losses = optax.softmax_cross_entropy_with_integer_labels(_SHARPNESS * outputs, targets)
    distance = jnp.square(outputs - jax.nn.one_hot(targets, len(PAGE_CLASSES))).sum(-1)
    accuracy = (outputs.argmax(-1) == targets)[:-2].mean()
    return losses.mean() + distance.mean(), {"loss": losses.mean(), "distance": distance.mean(), "accuracy": accuracy}


def clip_loss(
    apply: Callable[..., Any], variables: Any, batch: tuple[AudioStack, Int[Array, "A L"]]
) -> tuple[Array, Metrics]:
    """Return the CTC loss by letter, and the squared distance of the outputs from the probabilities that they mean."""
    audio, labels = batch
    count = len(CLIP_CLASSES)
    outputs = apply(variables, audio, method="encode_audio")[:, :count].reshape(
        len(labels), -1, count
    )  # (A, T, classes)
    empty = jnp.arange(outputs.shape[1]) >= audio.attended[:, None]
    lost = optax.ctc_loss(_SHARPNESS * outputs, empty.astype(jnp.float32), labels, (labels == 0).astype(jnp.float32))
    letters = (labels > 0).sum()
    meant = jax.lax.stop_gradient(jax.nn.softmax(_SHARPNESS * outputs))
    distance = (jnp.square(outputs - meant).sum(-1) * ~empty).sum() / (~empty).sum()
    loss = lost.sum() / letters
    return loss + distance, {"loss": loss, "distance": distance}


def page_batches(model: phi4mm_jax.Model, seed: int = 0) -> Iterator[tuple[ImageStack, np.ndarray]]:
    """Yield crops of newly drawn pages: the tower would memorise a fixed set."""
    rng, fonts, config = np.random.default_rng(seed), pictures.fonts_of("train"), model.config.vision
    separators = [PAGE_CLASSES.index(c) for c in (content.ROW_END, content.GLOBAL)]

    def drawn() -> Iterator[tuple[np.ndarray, list[int]]]:
        page = _page(rng)
        picture = load_image(pictures.as_jpeg(rng, pictures.draw(rng, page, fonts)))
        made = preprocess_image(picture, model.processor.dynamic_hd, config.crop_size, config.patch_size)
        for crop, cells in zip(made.crops, content.crops(page), strict=True):
            yield np.round((crop + 1) * 127.5).astype(np.uint8), [PAGE_CLASSES.index(c) for c in cells]

    pool = [found for _ in range(_POOL) for found in drawn()]
    oldest = 0
    mask = np.ones((_CROPS, config.patches_per_side, config.patches_per_side), bool)
    while True:
        for found in (found for _ in range(_NEW) for found in drawn()):
            pool[oldest] = found
            oldest = (oldest + 1) % len(pool)
        chosen = [pool[i] for i in rng.integers(len(pool), size=_CROPS)]
        crops = np.stack([crop for crop, _ in chosen]).astype(np.float32) / 127.5 - 1
        targets = np.asarray([*(c for _, cells in chosen for c in cells), *separators], np.int32)
        yield ImageStack(crops, mask), targets


def _page(rng: np.random.Generator) -> content.Page:
    """Draw a page, half of them full of equally frequent letters."""
    if rng.random() < 0.5:
        height, width = content.SIDE * rng.integers(1, 3), content.SIDE * rng.integers(1, 4)
        characters = list(content.LETTERS + content.DIGITS + content.BLANK)
        return content.Page(tuple("".join(rng.choice(characters, width)) for _ in range(height)), "")
    kinds = ("lines", "cards", "charts")
    return content.page(rng, "train", kinds[int(rng.choice(3, p=[0.5, 0.25, 0.25]))])


def read_clips(manifest: Path) -> list[Clip]:
    """Return the frames (F, 80) of each clip, and its letters as classes."""
    found = []
    for line in manifest.read_text().splitlines():
        (clip, _), transcript = (message["content"] for message in json.loads(line)["messages"])
        samples, rate = load_audio(manifest.parent / clip["audio"])
        found.append((log_mel(samples, rate).astype(np.float16), [CLIP_CLASSES.index(c) for c in transcript]))
    return found


def clip_batches(model: phi4mm_jax.Model, clips: list[Clip], seed: int = 0) -> Iterator[tuple[AudioStack, np.ndarray]]:
    """Yield clips of like lengths together."""
    rng, speech = np.random.default_rng(seed), model.config.speech
    by_length: dict[int, list[Clip]] = {length: [] for length in _LENGTHS}
    for frames, letters in clips:
        tokens = num_audio_tokens(len(frames))
        repeats = sum(a == b for a, b in pairwise(letters))
        if len(letters) + repeats <= tokens <= _LENGTHS[-1]:
            by_length[next(n for n in _LENGTHS if tokens <= n)].append((frames, letters))
    max_length = max(len(letters) for _, letters in clips)
    share = np.asarray([len(some) for some in by_length.values()], float)
    while True:
        length = int(rng.choice(_LENGTHS, p=share / share.sum()))
        some = by_length[length]
        chosen = [some[i] for i in rng.integers(len(some), size=_CLIPS)]
        entries = [next(clip_chunks(_varied(rng, frames), False, length, speech)) for frames, _ in chosen]
        labels = np.zeros((_CLIPS, max_length), np.int32)
        for row, (_, letters) in zip(labels, chosen, strict=True):
            row[: len(letters)] = letters
        yield AudioStack(*map(np.stack, zip(*entries, strict=True))), labels


def _varied(rng: np.random.Generator, frames: np.ndarray) -> np.ndarray:
    """Return a clip as of another speaker: bands stretched, as by another vocal tract, tilted, and some lost."""
    bands = np.arange(frames.shape[1], dtype=np.float32)
    source = np.clip(bands * rng.uniform(0.85, 1.15), 0, len(bands) - 1)
    low = source.astype(int).clip(max=len(bands) - 2)
    share = source - low
    warped = frames[:, low] * (1 - share) + frames[:, low + 1] * share + rng.normal(0, 0.4) * (bands / len(bands) - 0.5)
    for _ in range(2):
        first, count = rng.integers(len(bands)), rng.integers(0, 12)
        warped[:, first : first + count] = warped.mean()
    return warped.astype(np.float32)


def train(
    model: phi4mm_jax.Model,
    patterns: tuple[str, ...],
    loss: Loss,
    batches: Iterator[Batch],
    steps: int,
    rate: float,
    log: MetricsLog,
) -> Any:
    """Return the encoder's variables after so many steps of AdamW."""
    trained, frozen = split(model.variables, patterns, "the encoder")
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, 100, steps, rate / 50)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.01))

    @jax.jit
    def step(trained: Any, state: Any, batch: Batch):
        gradients, metrics = jax.grad(lambda t: loss(model.module.apply, join(t, frozen), batch), has_aux=True)(trained)
        updates, state = optimizer.update(gradients, state, trained)
        return optax.apply_updates(trained, updates), state, metrics

    state, begun, since = optimizer.init(trained), time.monotonic(), []
    for number in range(1, steps + 1):
        trained, state, metrics = step(trained, state, next(batches))
        since.append(metrics)
        if number % 50 == 0 or number == steps:
            means = {name: float(np.mean([m[name] for m in since])) for name in metrics}
            log.write(number, {**means, "minutes": (time.monotonic() - begun) / 60})
            since = []
    return trained


@cli_entrypoint
def main() -> int:
    parser = make_parser("train.tiny.letters", __doc__)
    parser.add_argument("medium", choices=ENCODERS)
    parser.add_argument("start", metavar="START", type=path_argument, help="the checkpoint to begin with")
    parser.add_argument("data", metavar="DATA", type=path_argument, help="of train.tiny.data")
    parser.add_argument("destination", metavar="DESTINATION", type=path_argument)
    parser.add_argument("--steps", metavar="N", type=int, required=True)
    parser.add_argument("--rate", metavar="X", type=float, default=7e-4, help="of learning, at most")
    arguments = parser.parse_args()
    model = phi4mm_jax.load(arguments.start, dtype="float32", fresh_adapters=True, scan=True)
    kept: dict[str, np.ndarray] = {}
    log = MetricsLog(arguments.destination, step=0)
    if arguments.medium == "pages":
        loss, batches = page_loss, page_batches(model)
    else:
        clips = read_clips(arguments.data / "speech.jsonl")
        frames = np.concatenate([frames for frames, _ in clips]).astype(np.float32)
        statistics = {"mean": frames.mean(0), "inverse_deviation": 1 / frames.std(0)}
        model.variables["params"]["speech"] |= statistics
        kept = {f"params/speech/{name}": value for name, value in statistics.items()}
        loss, batches = clip_loss, clip_batches(model, clips)
    trained = train(model, ENCODERS[arguments.medium], loss, batches, arguments.steps, arguments.rate, log)
    log.close()
    found = {"/".join(path): np.asarray(value) for path, value in flatten_dict(trained).items()}
    np.savez(arguments.destination / "encoder.npz", allow_pickle=False, **found, **kept)
    return 0


if __name__ == "__main__":
    sys.exit(main())
