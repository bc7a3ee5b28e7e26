"""Inputs of a checkpoint's linear maps over a set of examples, by which `quantization` rounds its weights to int4.

Of each map the second moments are kept, the sum over tokens of x x^T: the squared error of its output depends on
nothing else. The examples go through the float model one by one. Padding is left out, and so is what no token takes.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Bool, Float

from phi4mm_jax.api import load
from phi4mm_jax.batch import NO_MEDIA, Batch
from phi4mm_jax.checkpoint.contents import AdaptersFrom
from phi4mm_jax.data.conversation import read_conversation
from phi4mm_jax.data.manifests import Manifest, open_manifest
from phi4mm_jax.errors import InputError
from phi4mm_jax.model import Phi4MM
from phi4mm_jax.model.layers import Linear, unstack_layers
from phi4mm_jax.model.lora import Projection
from phi4mm_jax.processing.audio_features import num_audio_tokens
from phi4mm_jax.processing.batching import BatchSizes, Row, assemble, num_chunks
from phi4mm_jax.processing.chat import render_chat
from phi4mm_jax.processing.media_urls import with_paths
from phi4mm_jax.processing.processor import Processor
from phi4mm_jax.quantization import InputMoments, ModulePath, ParamPath, contracted_axes, is_quantized
from phi4mm_jax.utils.checks import check_whole

MAX_EXAMPLES = 128
_MIN_LENGTH = 64  # shorter texts and clips are padded to this
Moments = dict[ModulePath, Float[Array, "I I"]]  # of the unrolled model's linear maps
Masks = Mapping[str, Bool[Array | np.ndarray, "..."]]  # which rows of their inputs modules are measured by
_log = logging.getLogger(__name__)


def input_moments(
    source: str | Path,
    manifest: str | Path,
    *,
    max_examples: int = MAX_EXAMPLES,
    adapters_from: AdaptersFrom | None = None,
    fresh_adapters: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> InputMoments:
    """Return the moments of the inputs of a checkpoint's linear maps, as `checkpoint.convert.to_orbax` takes them.

    The weights are held in bfloat16, and all is computed in float32. Each example has the adapter of its media.

    Args:
        source, adapters_from, fresh_adapters: as in `phi4mm_jax.load`.
        manifest: examples as training or evaluation reads them; those without an answer are prompts.
        max_examples: how many are read, from all over the manifest.
        progress: called with the number of examples that are done, and of all.

    Returns:
        Float32 arrays (inputs, inputs) for each layer. A map that no example reaches is left out, which is logged.

    Raises:
        CheckpointError, ConfigError: as `phi4mm_jax.load`.
        InputError: the manifest is empty or cannot be read, or an example, such as one of its media, cannot be used.
    """
    check_whole("max_examples", max_examples, 1)
    with closing(open_manifest(Path(manifest))) as lines:
        count = min(max_examples, len(lines))
        numbers = [i * len(lines) // count for i in range(count)]
        model = load(source, adapters_from=adapters_from, fresh_adapters=fresh_adapters)
        for _ in _rows(lines, numbers, model.processor):  # so that a bad one ends it before anything is computed
            pass
        params = model.variables["params"]
        for name in {"vision", "speech"} & params.keys():
            params[name] = unstack_layers(params[name])  # on one CPU they are unrolled already
        module = model.module.clone(dtype=jnp.float32, scan_encoders=False)
        flat: dict[Any, Any] = flatten_dict({"params": params})
        moments = {
            p[1:-1]: _zeros(p, x.shape) for p, x in flat.items() if is_quantized(p, x.ndim) and p[-1] != "embedding"
        }
        for done, row in enumerate(_rows(lines, numbers, model.processor), 1):
            batch = assemble([[row]], _sizes(row, model.processor), model.config)
            _add(moments, module, model.variables, batch._replace(segments=None))
            if progress is not None:
                progress(done, count)
    maps = _by_layers(moments)
    found = {path: layers for path, layers in maps.items() if any(m.any() for m in layers)}
    if unseen := maps.keys() - found.keys():
        names = ", ".join(sorted({path[0] for path in unseen}))
        _log.warning("%s: no example reaches all maps of %s, which are rounded to nearest", manifest, names)
    return found


def _zeros(path: ParamPath, shape: tuple[int, ...]) -> Float[Array, "I I"]:
    inputs = math.prod(shape[axis] for axis in contracted_axes(path, len(shape)) or ())
    return jnp.zeros((inputs, inputs))


def _by_layers(moments: Moments) -> dict[ModulePath, list[np.ndarray]]:
    """Return the moments of each map, of all of its layers in their order, under its path where layers are stacked."""
    found: dict[ModulePath, list[np.ndarray]] = {}
    for path in sorted(moments, key=lambda path: [int(name.rpartition("_")[2]) for name in path if _is_layer(name)]):
        found.setdefault(_stacked(path), []).append(np.asarray(moments[path]))
    return found


def _stacked(path: ModulePath) -> ModulePath:
    return tuple("layers" if _is_layer(name) else name for name in path)


def _is_layer(name: str) -> bool:
    return name.startswith("layers_")


def _rows(lines: Manifest, numbers: Sequence[int], processor: Processor) -> Iterator[Row]:
    for number in numbers:
        try:
            yield _row(lines.read(number), lines.folder, processor)
        except InputError as error:
            raise InputError(f"{lines.where(number)}: {error}. Repair the example, or take it out") from error


def _row(values: Any, folder: Path, processor: Processor) -> Row:
    if not isinstance(values, Mapping):
        raise InputError(f"the example is a {type(values).__name__}; expected an object with messages")
    messages = with_paths(read_conversation(values).messages, folder)
    is_answered = messages[-1].get("role") == "assistant"
    crop_size = processor.config.vision.crop_size
    prompt = render_chat(messages, processor.tokenizer, add_generation_prompt=not is_answered, crop_size=crop_size)
    return processor.row_of(prompt)


def _sizes(row: Row, processor: Processor) -> BatchSizes:
    """Return the sizes of a row's batch; few differ: lengths are powers of two, crops and chunks go one by one."""
    max_tokens = processor.config.speech.chunk_tokens
    clips = [num_audio_tokens(len(frames)) for frames in row.clips]
    return BatchSizes(
        min(_padded(len(row.tokens)), processor.context),
        sum(len(image.crops) for image in row.images),
        sum(num_chunks(n, max_tokens) for n in clips),
        _padded(min(max(clips, default=0), max_tokens)),
    )


def _padded(length: int) -> int:
    return 1 << (max(length, _MIN_LENGTH) - 1).bit_length()


def _add(moments: Moments, module: Phi4MM, variables: Mapping[str, Any], batch: Batch) -> None:
    """Add the moments of a batch of one row."""
    config, places = module.config, np.arange(batch.tokens.shape[1])
    valid = places < batch.lengths[:, None]
    is_media = valid & (batch.media != NO_MEDIA)
    taken, tables, start = batch.media[is_media], [], 0

    def compute(masks: Masks, method: Callable[..., Any], *inputs: Any) -> Any:
        before = {path: moments[path] for path in moments if path[0] in masks}
        found, after = _computed(module, method, variables, before, masks, inputs)
        moments.update(after)
        return found

    if batch.images is not None:
        count, separators = config.vision.features_per_crop, []
        end = len(batch.images.crops) * count
        for i in range(len(batch.images.crops)):
            images = jax.tree.map(lambda x, i=i: x[i : i + 1], batch.images)
            used = np.isin([*range(start, start + count), end, end + 1], taken)
            used[count:] &= i == 0  # the separators come with each crop
            masks = {"vision": images.patch_mask.reshape(1, -1) & used[:count].any(), "image_embedder": used}
            *features, row, whole = np.asarray(compute(masks, Phi4MM.encode_images, images))
            tables, separators, start = [*tables, features], [row, whole], start + count
        tables, start = [*tables, separators], end + 2
    if batch.audio is not None:
        chunks, frames = batch.audio.frames.shape[:2]
        tokens = frames // config.speech.time_reduction - 1
        for i in range(chunks):  # the stem is a loop over several
            audio = jax.tree.map(lambda x, i=i: x[i : i + 1], batch.audio)
            used = np.isin(np.arange(start, start + tokens), taken)[None]
            masks = {
                "stem": np.pad(used, ((0, 0), (1, 0))),  # there is a token before the chunk's own
                "speech": used,
                "audio_projector": used & ~audio.with_images[:, None],
                "audio_projector_with_images": used & audio.with_images[:, None],
            }
            tables.append(np.asarray(compute(masks, Phi4MM.encode_audio, audio)))
            start += tokens
    features = np.zeros((len(places), config.decoder.embed_dim), np.float32)  # of each token, whatever the media
    if tables:
        features[is_media[0]] = np.concatenate(tables)[taken]
    media = np.where(is_media, places, NO_MEDIA)
    compute({"decoder": valid}, _decode, batch.tokens, media, features, batch.lengths, batch.adapters)


def _decode(module: Phi4MM, tokens: Array, media: Array, features: Array, lengths: Array, adapters: Array) -> None:
    module.decode(module.embed(tokens, media, features), lengths, adapters)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _computed(
    module: Phi4MM, method: Callable[..., Any], variables: Any, moments: Moments, masks: Masks, inputs: Any
) -> tuple[Any, Moments]:
    """Return what a method of the model gives, and the moments, which are donated, with those of its maps added."""
    moments = dict(moments)

    def measure(call: Callable[..., Any], given: Any, keywords: Any, context: Any) -> Any:
        linear, path = context.module, context.module.path
        if isinstance(linear, (Linear, Projection)) and context.method_name == "__call__":
            mask = masks[[name for name in path if name in masks][-1]]
            moments[path] = moments[path] + _second_moments(linear, given[0], mask)
        return call(*given, **keywords)

    with nn.intercept_methods(measure):  # mutable: what is measured may not lie within a branch
        found, _ = module.apply(variables, *inputs, method=method, mutable=["intermediates"])
    return found, moments


def _second_moments(
    linear: Linear | Projection, x: Float[Array, "..."], mask: Bool[Array | np.ndarray, "..."]
) -> Float[Array, "I I"]:
    """Return the second moments of a map's inputs, of the rows that the mask has.

    Args:
        mask: of tokens; in the stem of the speech encoder several frames, and each of their bands, are a token's.
    """
    axes = x.ndim - len(linear.inputs)
    x = x.reshape(*x.shape[:axes], math.prod(x.shape[axes:])).astype(jnp.float32)
    if mask.ndim > 1:
        mask = jnp.repeat(mask, x.shape[1] // mask.shape[1], 1)
    x = jnp.where(mask.reshape(*mask.shape, *[1] * (x.ndim - mask.ndim)), x, 0)
    return jnp.einsum("...I,...J->IJ", x, x, precision="highest")
