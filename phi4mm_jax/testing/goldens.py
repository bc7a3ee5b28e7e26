"""Goldens: outputs of a reference for given prompts and media, kept in a folder.

    goldens.json          the cases (see `Case`); "recorded": by what, and in which dtype (absent: float32)
    goldens.safetensors   CASE.input_ids, CASE.logits (the last 24 positions), CASE.logits_first (the first 4),
                          CASE.generated (greedy, from the whole sequence at each token, without a cache);
                          image_N.*, audio_N.*: the tensors of each medium by itself, thinned as in `thinned`
    inputs/               image_N.*, audio_N.*: the media, which cases name by N

`compare` measures a model's distance from them.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from phi4mm_jax.config import read_json
from phi4mm_jax.errors import CheckpointError
from phi4mm_jax.processing.audio import load_audio
from phi4mm_jax.processing.batching import Row
from phi4mm_jax.processing.images import choose_grid, load_image
from phi4mm_jax.processing.processor import Processor
from phi4mm_jax.processing.prompt import KINDS, Kind
from phi4mm_jax.utils.checks import is_whole
from phi4mm_jax.utils.paths import local_path

LAST, FIRST = 24, 4  # positions of which logits are kept
_LONG_CLIP = 500  # tokens; longer clips are thinned more

TENSORS_OF_MEDIUM: dict[Kind, tuple[str, ...]] = {
    "image": ("num_tokens", "size", "attention_mask", "pixel_values", "vision_features", "embeds"),
    "audio": ("num_tokens", "frames", "features", "encoder", "embeds_speech", "embeds_vision"),
}
TENSORS_OF_CASE = ("input_ids", "logits_first", "logits", "generated")
_OF_GRADIENTS = ("answer_ids", "loss", "grad", "gradnorm")  # which the fixtures hold too, and only the tests compare


@dataclass(frozen=True)
class Case:
    """Prompt of a reference's run.

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
    """Folder of goldens, read. `media` are the numbers of the media of which there are tensors, by kind."""

    folder: Path
    dtype: str  # that the reference computed in
    cases: tuple[Case, ...]
    media: Mapping[Kind, tuple[int, ...]]
    tensors: Mapping[str, np.ndarray]

    def file(self, kind: Kind, number: int) -> Path:
        return input_file(self.folder, kind, number)

    def media_of(self, case: Case) -> tuple[list[Path], list[Path]]:
        """Return the files of the case's images and clips, in the order of its placeholders."""
        return [self.file("image", n) for n in case.images], [self.file("audio", n) for n in case.audios]


# Files.


def input_file(folder: Path, kind: Kind, number: int) -> Path:
    """Return the file of a medium, in any format.

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
    expected = {f"{case.name}.{tensor}" for case in cases for tensor in TENSORS_OF_CASE}
    expected |= {f"{kind}_{n}.{tensor}" for kind in KINDS for n in numbers[kind] for tensor in TENSORS_OF_MEDIUM[kind]}
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
        if kind is list and not all(map(is_whole, value[key])):
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
    """Return the numbers of the media that have tensors."""
    names = {name.partition(".")[0].removeprefix(f"{kind}_") for name in tensors if name.startswith(f"{kind}_")}
    return tuple(sorted(int(n) for n in names if n.isdecimal()))


def _shape_problems(case: Case, tensors: Mapping[str, np.ndarray]) -> Iterator[str]:
    shapes = {t: tensors[f"{case.name}.{t}"].shape for t in TENSORS_OF_CASE if f"{case.name}.{t}" in tensors}
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
        recorded: "dtype", and the versions that the goldens come from.
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


# Tensors of a medium.


def thinned(tensor: str, value: np.ndarray, tokens: int) -> np.ndarray:
    """Thin a medium's tensor, as goldens keep it, to stay small: every n-th pixel, feature, row.

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
    """Process an image; return its row and the tensors that goldens hold of that, not yet thinned.

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
    """Process a clip, likewise."""
    row = processor.row("<|audio_1|>", audios=[audio])
    (frames,) = row.clips
    return row, {"num_tokens": np.array([len(row.tokens)]), "frames": np.array([len(frames)]), "features": frames}
