"""Goldens: what a reference computes from given prompts and media, kept in a folder, and a model's distance from it.

    goldens.json          the cases (see `Case`); "recorded": by what, and in which dtype (absent: float32)
    goldens.safetensors   CASE.input_ids, CASE.logits (the last 24 positions), CASE.logits_first (the first 4),
                          CASE.generated (greedy, from the whole sequence at each token, without a cache);
                          image_N.*, audio_N.*: what each medium becomes by itself, thinned as in `thinned`
    inputs/               image_N.*, audio_N.*: the media, which cases name by N

What is compared, and how far it may be off:

- Token ids, masks and counts are identical; so are greedy tokens, where all is float32.
- In float32 the largest error of logits is 5e-5 of the largest golden logit for a decoder of three layers, and in
  proportion for deeper ones: 5.3e-4 for the release's 32. At the scale 6 of `tests/fixtures/ms_tiny` that is 3e-4,
  twice the worst error measured. With its layers repeated to the release's depth the worst was 1.4e-4 of the scale,
  which is rounding: PyTorch's float32 was 3.6e-4 away from its own float64 in the same case.
- Encoder outputs and embeddings: 1e-4 of the golden's largest value. Pixels and log-mel features: 1e-5.
- Where either side was computed in bfloat16, single logits scatter, and near-ties fall either way: the root mean square
  of the error is at most 0.3 of the golden's for logits, 0.1 for features, and tokens are counted, not judged. On the
  fixture one rounding to bfloat16, PyTorch's or this one's, is up to 0.18 and 0.03 away from float32; a model that is
  wrong, at 1.4. This finds mistakes, no more: parity is proved in float32, against goldens recorded in float32.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from phi4mm_jax.adapters import ADAPTERS, default_adapter
from phi4mm_jax.api import Model
from phi4mm_jax.batch import NO_MEDIA, AudioStack, Batch, ImageStack
from phi4mm_jax.config import Phi4MMConfig, read_json
from phi4mm_jax.engine import Engine, EngineConfig, Request
from phi4mm_jax.errors import CheckpointError, InputError
from phi4mm_jax.model.speech import HALO_FRAMES
from phi4mm_jax.processing.audio import load_audio
from phi4mm_jax.processing.batching import Row, bucket
from phi4mm_jax.processing.images import choose_grid, load_image
from phi4mm_jax.processing.processor import Processor
from phi4mm_jax.processing.prompt import KINDS, Kind
from phi4mm_jax.utils.paths import local_path

LAST, FIRST = 24, 4  # positions of which logits are kept
_LONG_CLIP = 500  # tokens; longer clips are thinned more
_SHORTEST = 64  # tokens to which rows are padded, or four times that, and so on
_CHUNK = 256  # tokens that are prefilled at once

_EXACT = ("num_tokens", "size", "frames", "attention_mask")
_OF_MEDIUM: dict[Kind, tuple[str, ...]] = {
    "image": ("num_tokens", "size", "attention_mask", "pixel_values", "vision_features", "embeds"),
    "audio": ("num_tokens", "frames", "features", "encoder", "embeds_speech", "embeds_vision"),
}
_OF_CASE = ("input_ids", "logits_first", "logits", "generated")
_OF_GRADIENTS = ("answer_ids", "loss", "grad", "gradnorm")  # which the fixtures hold too, and only the tests compare


@dataclass(frozen=True)
class Case:
    """A prompt of a reference's run.

    Attributes:
        prompt: a raw string with placeholders.
        images, audios: the media of its placeholders, by their number in `inputs/`.
        mode: 0 text, 1 images, 2 audio, 3 both.
        tokens: the prompt's length.
        min_margin: the smallest distance between the best two logits over the generated tokens.
    """

    name: str
    prompt: str
    images: tuple[int, ...]
    audios: tuple[int, ...]
    mode: int
    tokens: int
    min_margin: float


@dataclass(frozen=True)
class Goldens:
    """A folder of goldens, read. `media` are the numbers of the media of which there are tensors, by kind."""

    folder: Path
    dtype: str  # that the reference computed in
    cases: tuple[Case, ...]
    media: Mapping[Kind, tuple[int, ...]]
    tensors: Mapping[str, np.ndarray]

    def file(self, kind: Kind, number: int) -> Path:
        return input_file(self.folder, kind, number)

    def media_of(self, case: Case) -> tuple[list[Path], list[Path]]:
        """The files of the case's images and clips, in the order of its placeholders."""
        return [self.file("image", n) for n in case.images], [self.file("audio", n) for n in case.audios]


@dataclass(frozen=True)
class Check:
    """One comparison. Of values there are error and bound, of tokens how many are identical from the start, of all."""

    subject: str  # a case, or a medium such as "image_0"
    tensor: str
    passed: bool
    error: float | None = None
    bound: float | None = None
    identical: tuple[int, int] | None = None
    note: str = ""


# Files.


def input_file(folder: Path, kind: Kind, number: int) -> Path:
    """The file of a medium, in any format.

    Raises:
        CheckpointError: there is none, or there are several.
    """
    found = sorted(p for p in (folder / "inputs").glob(f"{kind}_{number}*") if p.stem == f"{kind}_{number}")
    if len(found) != 1:
        raise CheckpointError(
            f"{folder / 'inputs'}: holds {len(found)} files {kind}_{number}.*, expected one; copy the goldens again"
        )
    return found[0]


def read_goldens(folder: str | Path) -> Goldens:
    """Read a folder of goldens, and check that nothing is missing, extra or misshapen in it.

    Raises:
        CheckpointError: otherwise; it names the file, and the case or tensor.
    """
    folder = local_path(folder)
    path = folder / "goldens.json"
    if not path.exists():
        raise CheckpointError(f"{path}: no such file. Give a folder that python -m convert.record has written.")
    values = read_json(path)
    recorded = values.get("recorded", {})
    dtype = recorded.get("dtype", "float32") if isinstance(recorded, dict) else None
    if dtype not in ("float32", "bfloat16"):
        raise _malformed(path, f'"recorded" is {recorded!r:.60}, expected {{"dtype": "float32" or "bfloat16"}}')
    cases = _cases(path, values.get("cases"))
    tensors = _tensors(folder / "goldens.safetensors")
    numbers: dict[Kind, tuple[int, ...]] = {kind: _numbers(tensors, kind) for kind in KINDS}
    expected = {f"{case.name}.{tensor}" for case in cases for tensor in _OF_CASE}
    expected |= {f"{kind}_{n}.{tensor}" for kind in KINDS for n in numbers[kind] for tensor in _OF_MEDIUM[kind]}
    extra = {n for n in tensors.keys() - expected if [*n.split("."), ""][1] not in _OF_GRADIENTS}
    problems = [f"{name}: missing" for name in sorted(expected - tensors.keys())]
    problems += [f"{name}: of no case, image or clip" for name in sorted(extra)]
    for case in cases:
        problems += _shape_problems(case, tensors)
    if problems:
        raise _malformed(folder / "goldens.safetensors", "; ".join(problems[:8]))
    goldens = Goldens(folder, dtype, cases, numbers, tensors)
    for case in cases:
        goldens.media_of(case)
    for kind in KINDS:
        for number in numbers[kind]:
            goldens.file(kind, number)
    return goldens


def _cases(path: Path, values: Any) -> tuple[Case, ...]:
    if not isinstance(values, list) or not values:
        raise _malformed(path, 'has no list of "cases"')
    cases = tuple(_case(path, f"cases[{i}]", value) for i, value in enumerate(values))
    if len({c.name for c in cases}) < len(cases):
        raise _malformed(path, "two cases have the same name")
    return cases


def _case(path: Path, where: str, value: Any) -> Case:
    if not isinstance(value, dict):
        raise _malformed(path, f"{where} is {value!r:.60}, expected an object")
    for key, kind in _FIELDS.items():
        if not isinstance(value.get(key), kind):
            raise _malformed(path, f"{where}.{key} is {value.get(key)!r:.60}")
        if kind is list and not all(isinstance(n, int) for n in value[key]):
            raise _malformed(path, f"{where}.{key} is {value[key]!r:.60}, expected numbers of files in inputs/")
    images, audios = tuple(value["images"]), tuple(value["audios"])
    return Case(value["name"], value["prompt"], images, audios, value["mode"], value["tokens"], value["min_margin"])


_FIELDS: dict[str, Any] = {
    "name": str, "prompt": str, "images": list, "audios": list, "mode": int, "tokens": int, "min_margin": int | float,
}  # fmt: skip


def _tensors(path: Path) -> dict[str, np.ndarray]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file, though goldens.json is there; copy the goldens again") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise _malformed(path, f"is not a whole safetensors file ({error})") from error


def _numbers(tensors: Mapping[str, np.ndarray], kind: Kind) -> tuple[int, ...]:
    """The media that have tensors."""
    names = {name.partition(".")[0].removeprefix(f"{kind}_") for name in tensors if name.startswith(f"{kind}_")}
    return tuple(sorted(int(n) for n in names if n.isdecimal()))


def _shape_problems(case: Case, tensors: Mapping[str, np.ndarray]) -> Iterator[str]:
    shapes = {t: tensors[f"{case.name}.{t}"].shape for t in _OF_CASE if f"{case.name}.{t}" in tensors}
    if shapes.get("input_ids", (case.tokens,)) != (case.tokens,):
        yield f"{case.name}.input_ids: has shape {shapes['input_ids']}, and the case {case.tokens} tokens"
    for name, limit in (("logits_first", FIRST), ("logits", LAST)):
        rows = min(limit, case.tokens)
        if name in shapes and (len(shapes[name]) != 2 or shapes[name][0] != rows):
            yield f"{case.name}.{name}: has shape {shapes[name]}, expected {rows} rows"
    if "generated" in shapes and (len(shapes["generated"]) != 1 or not shapes["generated"][0]):
        yield f"{case.name}.generated: has shape {shapes['generated']}, expected at least one token"


def _malformed(path: Path, cause: str) -> CheckpointError:
    return CheckpointError(f"{path}: {cause}. Record or copy the goldens again.")


def write_goldens(
    folder: Path,
    cases: Sequence[Case],
    tensors: Mapping[str, np.ndarray],
    media: Mapping[Kind, Sequence[Path]],
    recorded: Mapping[str, str],
) -> None:
    """Write goldens into a folder; it reads back by `read_goldens`.

    Args:
        tensors: of all cases and media, thinned.
        media: the files, copied into `inputs/`, that the cases name by their index here.
        recorded: "dtype", and whatever says where the goldens come from.
    """
    (folder / "inputs").mkdir()
    for kind, paths in media.items():
        for number, path in enumerate(paths):
            shutil.copyfile(path, folder / "inputs" / f"{kind}_{number}{path.suffix}")
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, folder / "goldens.safetensors")
    clips = [load_audio(path) for path in media["audio"]]
    values = {
        "recorded": dict(recorded),
        "image_sizes": [load_image(path).size for path in media["image"]],  # width, height
        "audio": [[round(len(samples) / rate, 2), rate] for samples, rate in clips],  # seconds, Hz
        "cases": [asdict(case) for case in cases],
        "grad_cases": [],
        "tokenizer": [],
    }
    (folder / "goldens.json").write_text(
        json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False), encoding="utf-8"
    )


# What is kept of a medium.


def thinned(tensor: str, value: np.ndarray, tokens: int) -> np.ndarray:
    """What goldens keep of a medium's tensor, to stay small: every n-th pixel, feature, row.

    Args:
        tensor: its name, such as "pixel_values" (C, 3, 448, 448), "vision_features" (C, 256, D), "embeds" (T, D).
        tokens: of the medium; a clip's features and encoder outputs are kept whole up to 500.
    """
    match tensor:
        case "pixel_values":
            return value[:, :, ::7, ::7]
        case "vision_features":
            return value[:, ::9]
        case "embeds":
            return value[::5]
        case "embeds_speech" | "embeds_vision":
            return value[::3]
        case "features" if tokens > _LONG_CLIP:
            return value[::16]
        case "encoder" if tokens > _LONG_CLIP:
            return value[::4]
    return value


def image_inputs(processor: Processor, image: Any) -> tuple[Row, dict[str, np.ndarray]]:
    """An image as the processor gives it, with what goldens hold of that, not yet thinned.

    Raises:
        InputError: as `Processor.row`.
    """
    row = processor.row("<|image_1|>", [image])
    (features,), crop = row.images, processor.config.vision.crop_size
    columns, rows = choose_grid(*load_image(image).size, processor.dynamic_hd, crop)
    return row, {
        "num_tokens": np.array([features.num_tokens]),
        "size": np.array([rows * crop, columns * crop]),
        "attention_mask": features.patch_mask.astype(np.uint8),
        "pixel_values": features.crops.transpose(0, 3, 1, 2),
    }


def audio_inputs(processor: Processor, audio: Any) -> tuple[Row, dict[str, np.ndarray]]:
    """A clip, likewise."""
    row = processor.row("<|audio_1|>", audios=[audio])
    (frames,) = row.clips
    return row, {"num_tokens": np.array([len(row.tokens)]), "frames": np.array([len(frames)]), "features": frames}


# What a model makes of it.


def image_tensors(model: Model, image: Any) -> dict[str, np.ndarray]:
    """All that goldens hold of an image, thinned, as the model computes it: float32, or what the processor gives."""
    row, tensors = image_inputs(model.processor, image)
    batch = model.processor.batch([row])
    assert batch.images is not None
    table, features = _encode_images(model, batch.images)
    tensors["vision_features"] = features[: len(row.images[0].crops)]
    tensors["embeds"] = table[batch.media[0, : batch.lengths[0]]]
    return {name: thinned(name, value, len(row.tokens)) for name, value in tensors.items()}


def audio_tensors(model: Model, audio: Any) -> dict[str, np.ndarray]:
    """All that goldens hold of a clip, likewise; through either projector."""
    row, tensors = audio_inputs(model.processor, audio)
    batch = model.processor.batch([row])
    stack, taken = batch.audio, batch.media[0, : batch.lengths[0]]
    assert stack is not None
    # What enters the encoder, put together again from its chunks.
    pieces = [frames[HALO_FRAMES:last] for frames, last in zip(stack.frames, stack.last, strict=True)]
    tensors["features"] = np.concatenate(pieces)
    for name, with_images in (("embeds_speech", False), ("embeds_vision", True)):
        stack = stack._replace(with_images=np.full_like(stack.with_images, with_images))
        table, encoded = _encode_audio(model, stack)
        tensors["encoder"] = encoded[taken]
        tensors[name] = table[taken]
    return {name: thinned(name, value, len(row.tokens)) for name, value in tensors.items()}


# Crops and chunks are encoded one by one, and chunks padded alike: one compiled program each. None depends on others.


def _encode_images(model: Model, images: ImageStack) -> tuple[np.ndarray, np.ndarray]:
    """The embeddings (C * M + 2, D) that `Batch.media` indexes, and the tower's output (C, M, D)."""
    ones = [ImageStack(*(values[i : i + 1] for values in images)) for i in range(len(images.crops))]
    tables, features = zip(*(_encode(model, one, "encode_images", "vision") for one in ones), strict=True)
    size = model.config.vision.features_per_crop
    return np.concatenate([*(table[:size] for table in tables), tables[0][size:]]), np.concatenate(features)


def _encode_audio(model: Model, stack: AudioStack) -> tuple[np.ndarray, np.ndarray]:
    """Likewise of chunks, both (A * T, D)."""
    speech = model.config.speech
    size = (stack.frames.shape[1] - HALO_FRAMES) // speech.time_reduction
    padding = (0, 0), (0, (bucket(speech.chunk_tokens) - size) * speech.time_reduction), (0, 0)
    stack = stack._replace(frames=np.pad(stack.frames, padding))
    ones = [AudioStack(*(values[i : i + 1] for values in stack)) for i in range(len(stack.frames))]
    tables, features = zip(*(_encode(model, one, "encode_audio", "speech") for one in ones), strict=True)
    return np.concatenate([t[:size] for t in tables]), np.concatenate([f[0, :size] for f in features])


def _encode(model: Model, stack: ImageStack | AudioStack, method: str, tower: str) -> tuple[np.ndarray, np.ndarray]:
    """A stack of media through its tower and projector: the embeddings, and the tower's output."""
    table, features = _encode_jit(model.module, model.variables, stack, method, tower)
    return _numpy(table), _numpy(features)


@partial(jax.jit, static_argnames=("module", "method", "tower"))
def _encode_jit(module, variables, stack, method: str, tower: str):
    table, state = module.apply(
        variables, stack, method=method, capture_intermediates=lambda m, called: (m.name, called) == (tower, "__call__")
    )
    return table, state["intermediates"][tower]["__call__"][0]


def _numpy(array: jax.Array) -> np.ndarray:
    return np.asarray(array.astype(jnp.float32))


# Comparisons.


def unexercised(config: Phi4MMConfig, goldens: Goldens) -> list[str]:
    """The parts of a model that no case and no medium of the goldens runs through."""
    cases, boundary = goldens.cases, config.decoder.rope.original_length
    lengths = [case.tokens + len(goldens.tensors[f"{case.name}.generated"]) for case in cases]
    used = [default_adapter(bool(case.images), bool(case.audios)) for case in cases]
    runs = {
        "the decoder without an adapter": any(not case.images and not case.audios for case in cases),
        **{f"the {name} adapter": ADAPTERS[name] in used for name in config.loras},
        "images and clips in one prompt": any(case.images and case.audios for case in cases),
        "the vision tower": bool(goldens.media["image"]),
        "the speech encoder": bool(goldens.media["audio"]),
        f"sequences longer than {boundary} tokens": max(lengths) > boundary,
    }
    return [part for part, run in runs.items() if not run]


@dataclass(frozen=True)
class Bound:
    """The error allowed, relative to the golden's size, where both are the largest value or the root mean square."""

    measure: Literal["max", "rms"]
    relative: float

    def size(self, x: np.ndarray) -> float:
        x = np.abs(x.astype(np.float64))
        return float(x.max(initial=0.0) if self.measure == "max" else np.sqrt(np.mean(x**2)))


LOGITS_PER_LAYER = Bound("max", 5e-5 / 3)
INPUTS = Bound("max", 1e-5)
FEATURES = Bound("max", 1e-4)
ROUNDED_LOGITS = Bound("rms", 0.3)
ROUNDED_FEATURES = Bound("rms", 0.1)


def is_exact(model: Model, goldens: Goldens) -> bool:
    """Whether both sides are float32: whether the comparison is a proof."""
    return jnp.dtype(model.module.dtype) == jnp.float32 and goldens.dtype == "float32"


def compare_values(subject: str, tensor: str, ours: np.ndarray, golden: np.ndarray, bound: Bound) -> Check:
    """By the size of the difference. NaN is never within a bound, on either side."""
    if (problem := _not_comparable(ours, golden)) is not None:
        return Check(subject, tensor, False, note=problem)
    with np.errstate(invalid="ignore"):  # infinity less infinity
        error, allowed = bound.size(ours.astype(np.float64) - golden), bound.relative * bound.size(golden)
    note = "the golden is not finite" if not np.isfinite(golden).all() else ""
    return Check(subject, tensor, error <= allowed < np.inf, error, allowed, note=note)


def compare_exactly(subject: str, tensor: str, ours: np.ndarray, golden: np.ndarray) -> Check:
    """Masks, sizes and counts."""
    problem = _not_comparable(ours, golden)
    return Check(subject, tensor, problem is None and np.array_equal(ours, golden), note=problem or "")


def compare_tokens(subject: str, tensor: str, ours: Sequence[int], golden: Sequence[int]) -> Check:
    """Token ids, to the first that differs."""
    count, least = 0, min(len(ours), len(golden))
    while count < least and ours[count] == golden[count]:
        count += 1
    if count == len(ours) == len(golden):
        return Check(subject, tensor, True, identical=(count, count))
    a, b = (str(ids[count]) if count < len(ids) else "nothing" for ids in (ours, golden))
    return Check(subject, tensor, False, identical=(count, len(golden)), note=f"token {count} is {a}, golden {b}")


def _not_comparable(ours: np.ndarray, golden: np.ndarray) -> str | None:
    if ours.shape != golden.shape:
        return f"has shape {ours.shape}, golden {golden.shape}"
    return None if golden.size else "the golden is empty"


def verify_cases(model: Model, goldens: Goldens) -> Iterator[list[Check]]:
    """Compare each case's token ids, logits, and greedy tokens as the cached decoder generates them.

    Where the ids differ there is nothing more to compare, and only they are reported. All cases share a handful of
    compiled programs: rows are padded to a few lengths, prefilled by equal chunks, and go with all adapters.

    Raises:
        InputError: a prompt or medium that this model cannot take; it names the case.
    """
    longest = max(case.tokens for case in goldens.cases)
    room = max(case.tokens + len(goldens.tensors[f"{case.name}.generated"]) for case in goldens.cases)
    engine = _engine(model, min(room, model.processor.context))
    for case in goldens.cases:
        yield _verify_case(model, engine, goldens, case, longest)


def _verify_case(model: Model, engine: Engine, goldens: Goldens, case: Case, longest: int) -> list[Check]:
    exact, (images, audios) = is_exact(model, goldens), goldens.media_of(case)
    golden = {tensor: goldens.tensors[f"{case.name}.{tensor}"] for tensor in _OF_CASE}
    expected = golden["generated"].tolist()
    try:
        batch = model.process([case.prompt], [images], [audios])
        length = int(batch.lengths[0])
        ids = compare_tokens(case.name, "input_ids", batch.tokens[0, :length].tolist(), golden["input_ids"].tolist())
        if not ids.passed:
            return [ids]
        request = Request(case.prompt, images=images, audios=audios, max_new_tokens=len(expected))
        ((_, completion),) = engine.run([request])
        if completion.error is not None:
            raise InputError(completion.error)
    except InputError as error:
        raise InputError(f"case {case.name}: {error}") from error
    logits = _logits(model, batch, longest)
    ours = {"logits_first": logits[:FIRST][:length], "logits": logits[FIRST:][-length:]}
    layers = model.config.decoder.num_layers
    bound = replace(LOGITS_PER_LAYER, relative=LOGITS_PER_LAYER.relative * layers) if exact else ROUNDED_LOGITS
    values = [compare_values(case.name, name, value, golden[name], bound) for name, value in ours.items()]
    tokens = compare_tokens(case.name, "generated", completion.tokens, expected)
    if not tokens.passed and not exact:
        tokens = replace(tokens, passed=True, note="not judged in bfloat16")
    elif not tokens.passed and case.min_margin <= 2 * max(v.bound or 0.0 for v in values):
        note = f"{tokens.note}; a near-tie of {case.min_margin:.1e}, which rounding may decide: record another prompt"
        tokens = replace(tokens, note=note)
    return [ids, *values, tokens]


def _engine(model: Model, tokens: int) -> Engine:
    """An engine that prefills by chunks of one width, with all adapters in every program."""
    programs, compiled = copy(model._programs), model._programs
    programs.prefill = lambda _, *arguments, **options: compiled.prefill(model.variables, *arguments, **options)
    programs.decode = lambda _, *arguments, **options: compiled.decode(model.variables, *arguments, **options)
    config = EngineConfig(slots=1, page_size=_CHUNK, chunk=_CHUNK, cache_tokens=tokens)
    return Engine(programs, model.variables, model.processor, config)


def _logits(model: Model, batch: Batch, longest: int) -> np.ndarray:
    """The first and the last logits (FIRST + LAST, V) of a row, computed whole, without a cache."""
    length = int(batch.lengths[0])
    size = min(next(_SHORTEST * 4**n for n in count() if _SHORTEST * 4**n >= length), longest)
    media = batch.media[0, :length]
    tables = [] if batch.images is None else [_encode_images(model, batch.images)[0]]
    tables += [] if batch.audio is None else [_encode_audio(model, batch.audio)[0]]
    features = np.zeros((size, model.config.decoder.embed_dim), np.float32)
    if tables:
        features[:length] = np.concatenate(tables)[media]  # of a token without a medium, any
    taken = np.full((1, size), NO_MEDIA, np.int32)
    taken[0, :length] = np.where(media == NO_MEDIA, NO_MEDIA, np.arange(length))
    tokens = np.zeros((1, size), np.int32)
    tokens[0, :length] = batch.tokens[0, :length]
    at = np.concatenate([np.minimum(np.arange(FIRST), length - 1), np.maximum(np.arange(-LAST, 0) + length, 0)])
    found = _logits_jit(model.module, model.variables, features, tokens, taken, batch.lengths, batch.adapters, at)
    return np.asarray(found)


@partial(jax.jit, static_argnames="module")
def _logits_jit(module, variables, features, tokens, media, lengths, adapters, at):
    embedded = module.apply(variables, tokens, media, features, method="embed")
    hidden, _ = module.apply(variables, embedded, lengths, adapters, method="decode")
    return module.apply(variables, hidden[0, at], method="logits")


def verify_medium(model: Model, goldens: Goldens, kind: Kind, number: int) -> list[Check]:
    """Compare what the goldens hold of a medium: the processor's part, the encoder's output, the embeddings.

    Raises:
        InputError: a medium that this model cannot take; it names the file.
    """
    file, subject = goldens.file(kind, number), f"{kind}_{number}"
    try:
        tensors = image_tensors(model, file) if kind == "image" else audio_tensors(model, file)
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
    computed = FEATURES if is_exact(model, goldens) else ROUNDED_FEATURES
    checks = []
    for name in _OF_MEDIUM[kind]:
        golden = goldens.tensors[f"{subject}.{name}"]
        if name in _EXACT:
            checks.append(compare_exactly(subject, name, tensors[name], golden))
        else:  # the processor's part is float32 whatever the model's dtype
            bound = INPUTS if name in ("pixel_values", "features") else computed
            checks.append(compare_values(subject, name, tensors[name], golden, bound))
    return checks
