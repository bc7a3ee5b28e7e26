"""Checkpoints of any size with random weights in the original layout, for tests and benchmarks."""

import shutil
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np

from phi4mm_jax.checkpoint import pytorch
from phi4mm_jax.checkpoint.safetensors_io import DTYPES
from phi4mm_jax.checkpoint.staging import check_room, staged
from phi4mm_jax.checkpoint.tensor_types import ParamPath, parameter_shapes
from phi4mm_jax.config import Phi4MMConfig, read_json

DEVIATION = 0.02  # the release's initializer_range
_PIECE = 1 << 22  # values drawn at once
_PROCESSOR = ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json")


def write_random_checkpoint(
    config_file: str | Path,
    destination: str | Path,
    processor: str | Path | None = None,
    *,
    seed: int = 0,
    shard_bytes: int = pytorch.SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write config.json, the shards with their index, and the adapters' folders, in bfloat16.

    Weights are normal with a deviation of 0.02, the scales of norms around 1. The same seed gives the same files.

    Args:
        config_file: a config.json of the original layout, which gives the sizes.
        destination: a folder that does not exist.
        processor: a folder whose tokenizer's and processor's files are copied: without them nothing can be converted.
    """
    config_file, destination = Path(config_file), Path(destination)
    config = Phi4MMConfig.from_dict(read_json(config_file))
    tensors = pytorch.tensors_of("original", config)
    dtype = DTYPES["BF16"]
    parameters = {path: jax.ShapeDtypeStruct(shape, dtype) for path, shape in parameter_shapes(tensors).items()}

    def draw(path: ParamPath) -> np.ndarray:
        out = np.empty(parameters[path].shape, dtype)
        flat = out.reshape(-1)
        mean = np.float32(path[-1] in ("scale", "inverse_deviation"))

        def fill(start: int) -> None:
            random = np.random.default_rng((seed, zlib.crc32("/".join(path).encode()), start))
            piece = flat[start : start + _PIECE]
            piece[...] = mean + np.float32(DEVIATION) * random.standard_normal(len(piece), np.float32)

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(fill, range(0, len(flat), _PIECE)))
        return out

    size = sum(pytorch.nbytes(t, parameters) for t in tensors)
    with staged(destination) as folder:
        check_room(folder, size)
        pytorch.write(folder, tensors, parameters, draw, shard_bytes=shard_bytes, progress=progress)
        if processor is not None:
            for name in _PROCESSOR:
                shutil.copy(Path(processor) / name, folder)
        shutil.copy(config_file, folder / "config.json")  # last: a folder without it is not a checkpoint
