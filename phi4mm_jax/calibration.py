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
from jaxtyping import Array, Bool

from phi4mm_jax.api import load
from phi4mm_jax.batch import NO_MEDIA, Batch
from phi4mm_jax.checkpoint.contents import AdaptersFrom
from phi4mm_jax.data.conversation import read_conversation
from phi4mm_jax.data.manifests import Manifest, open_manifest
from phi4mm_jax.errors import InputError
from phi4mm_jax.model import Phi4MM
from phi4mm_jax.model.layers import Linear
from phi4mm_jax.model.lora import Projection
from phi4mm_jax.processing.batching import Row
from phi4mm_jax.processing.chat import render_chat
from phi4mm_jax.processing.media_urls import with_paths
from phi4mm_jax.processing.processor import Processor
from phi4mm_jax.quantization import MOMENTS, InputMoments, ModulePath, is_quantized
from phi4mm_jax.utils.checks import check_whole

MAX_EXAMPLES = 128
Masks = dict[ModulePath, Bool[Array | np.ndarray, "..."]]  # which rows of their inputs modules are measured by
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
        Float32 arrays (inputs, inputs), with layers stacked. A map that no example reaches is left out, which is
        logged.

    Raises:
        CheckpointError, ConfigError: as `phi4mm_jax.load`.
        InputError: the manifest is empty or cannot be read, or an example, such as one of its media, cannot be used.
    """
    check_whole("max_examples", max_examples, 1)
    moments: dict[ModulePath, jax.Array] = {}
    with closing(open_manifest(Path(manifest))) as lines:
        count = min(max_examples, len(lines))
        numbers = [i * len(lines) // count for i in range(count)]
        model = load(source, adapters_from=adapters_from, fresh_adapters=fresh_adapters, scan=True)
        module = model.module.clone(dtype=jnp.float32)
        for _ in _rows(lines, numbers, model.processor):  # so that a bad one ends it before anything is computed
            pass
        for done, row in enumerate(_rows(lines, numbers, model.processor), 1):
            _add(moments, module, model.variables, model.processor.batch([row]))
            if progress is not None:
                progress(done, count)
    found = {path: array for path, array in moments.items() if array.any()}
    params: dict[Any, Any] = flatten_dict({"params": model.variables["params"]})
    maps = {path[1:-1] for path, x in params.items() if is_quantized(path, x.ndim) and path[-1] != "embedding"}
    if unseen := maps - found.keys():
        names = ", ".join(sorted({path[0] for path in unseen}))
        _log.warning("%s: no example reaches all maps of %s, which are rounded to nearest", manifest, names)
    return {path: np.asarray(array) for path, array in found.items()}


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
    return processor.row_of(render_chat(messages, processor.tokenizer, add_generation_prompt=not is_answered))


def _add(moments: dict[ModulePath, jax.Array], module: Phi4MM, variables: Mapping[str, Any], batch: Batch) -> None:
    """Add the moments of a batch of one row."""
    config, valid = module.config, np.arange(batch.tokens.shape[1]) < batch.lengths[:, None]
    taken, tables, start = batch.media[valid & (batch.media != NO_MEDIA)], [], 0
    if batch.images is not None:
        crops, count = len(batch.images.crops), config.vision.features_per_crop
        used = np.isin(np.arange(start := crops * count + 2), taken)
        patches = batch.images.patch_mask.reshape(crops, -1) & used[:-2].reshape(crops, -1).any(1, keepdims=True)
        masks: Masks = {("vision",): patches, ("image_embedder",): used}
        tables.append(_measure(moments, module, "encode_images", variables, masks, batch.images))
    if batch.audio is not None:
        chunks, frames = batch.audio.frames.shape[:2]
        tokens = frames // config.speech.time_reduction - 1
        for i in range(chunks):  # one by one: the stem is a loop over several
            audio = jax.tree.map(lambda x, i=i: x[i : i + 1], batch.audio)
            used = np.isin(start + np.arange(tokens), taken)[None]
            masks = {
                ("speech", "stem"): np.pad(used, ((0, 0), (1, 0))),  # a token before the chunk's own
                ("speech",): used,
                ("audio_projector",): used & ~audio.with_images[:, None],
                ("audio_projector_with_images",): used & audio.with_images[:, None],
            }
            tables.append(_measure(moments, module, "encode_audio", variables, masks, audio))
            start += tokens
    features = jnp.concatenate(tables) if tables else None
    _measure(moments, module, "hidden", variables, {("decoder",): valid}, batch, features)


def _hidden(module: Phi4MM, batch: Batch, features: jax.Array | None) -> jax.Array:
    embedded = module.embed(batch.tokens, batch.media, features)
    return module.decode(embedded, batch.lengths, batch.adapters)[0]


_METHODS = {"encode_images": Phi4MM.encode_images, "encode_audio": Phi4MM.encode_audio, "hidden": _hidden}


def _measure(
    moments: dict[ModulePath, jax.Array],
    module: Phi4MM,
    method: str,
    variables: Mapping[str, Any],
    masks: Masks,
    *inputs: Any,
) -> jax.Array:
    """Add the moments of a method's maps, and return what it computes."""
    if method == "hidden":
        batch, features = inputs
        inputs = batch._replace(images=None, audio=None), features
    own = {path: x for path, x in moments.items() if (path[0],) in masks}
    if not own:
        shapes = jax.eval_shape(partial(_measured, module, method), variables, masks, inputs)[1]
        own = {path: jnp.zeros(x.shape, x.dtype) for path, x in shapes.items()}
    out, added = _with_added(module, method, variables, own, masks, inputs)
    moments |= added
    return out


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _with_added(module: Phi4MM, method: str, variables: Any, moments: Any, masks: Any, inputs: Any) -> Any:
    out, found = _measured(module, method, variables, masks, inputs)
    return out, {path: moments[path] + x for path, x in found.items()}


def _measured(module: Phi4MM, method: str, variables: Any, masks: Any, inputs: Any) -> tuple[Any, dict[Any, Any]]:
    def measure(call: Callable[..., Any], given: Any, keywords: Any, context: nn.module.InterceptorContext) -> Any:
        linear = context.module
        if context.method_name == "__call__" and isinstance(linear, Linear | Projection):
            axes = given[0].ndim - len(linear.inputs)
            x = given[0].reshape(*given[0].shape[:axes], math.prod(given[0].shape[axes:]))
            mask = next(masks[linear.path[:n]] for n in (2, 1) if linear.path[:n] in masks)
            x = jnp.where(_spread(mask, x.shape[:-1])[..., None], x, 0)
            found = jnp.einsum("...I,...J->IJ", x, x, precision="highest")
            linear.sow(MOMENTS, "inputs", found)
        return call(*given, **keywords)

    with nn.intercept_methods(measure):
        out, state = module.apply(variables, *inputs, method=_METHODS[method], mutable=[MOMENTS])
    found: dict[Any, Any] = flatten_dict(state[MOMENTS])
    return out, {path[:-1]: x for path, (x,) in found.items()}  # each is called once


def _spread(mask: Bool[Array | np.ndarray, "..."], rows: tuple[int, ...]) -> Bool[Array, "..."]:
    """Give each row of a map's inputs the mask of its token, of which the stem has several frames with their bands."""
    if mask.ndim > 1:
        mask = jnp.repeat(mask, rows[1] // mask.shape[1], 1)
    return jnp.broadcast_to(mask.reshape(*mask.shape, *[1] * (len(rows) - mask.ndim)), rows)
