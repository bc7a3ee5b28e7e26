"""Tensors of a checkpoint that are not in its weight table: what tools leave there, harmless or named in an error."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from phi4mm_jax.checkpoint.safetensors_io import Stored
from phi4mm_jax.errors import CheckpointError

# Of a shape, in errors.
EMPTY = ": empty, as DeepSpeed's ZeRO-3 leaves it; save with stage3_gather_16bit_weights_on_model_save"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
DEQUANTISE = (
    "give the checkpoint in bfloat16 that it was made from, or one that the same library has dequantised "
    "(transformers: model.dequantize(), then save_pretrained)"
)
# What modules compute for themselves, which older versions saved with the weights.
_BUFFERS = re.compile(
    r"(.*\.)?(rotary_emb|rotary_pos_emb)\.((original_|long_|short_)?inv_freq|(cos|sin)_cached)|.*\.position_ids"
)
_FLOATS = ("F16", "BF16", "F32", "F64")  # dtypes of weights that are not quantised
_PLAIN = (*_FLOATS, "BOOL", "I64", "U64", "C64")
_QUANTISED_NAME = re.compile(
    r".*(_scales?|_scale_inv|_scale_\d|\.scales?|\.qweight|\.qzeros|\.zeros|\.g_idx|zero_point|_packed|_absmax|\.absmax"
    r"|quant_map|quant_state[\w.]*|\.SCB|\.weight_format|\.weight_shape|\.W_q|_qdata|_amax|\._data)"
)
# Beside config.json, what tools that quantise leave.
_QUANTISED_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json", "quantization_config.json")
_WRAPPERS = {
    "_orig_mod": "torch.compile's, which is not there in model._orig_mod.save_pretrained(FOLDER)",
    "module": "DataParallel's, DDP's or DeepSpeed's, which is not there in model.module.save_pretrained(FOLDER)",
    "_fsdp_wrapped_module": "FSDP's: save a full state dict",
    "_checkpoint_wrapped_module": "activation checkpointing's: save the model without it",
    "_forward_module": "Lightning's: save the model that it wraps",
    "base_model": "PEFT's: save the model that merge_and_unload() or unload() returns",
}


def model_tensors(folder: Path, stored: Mapping[str, Stored], expected: Set[str]) -> dict[str, Stored]:
    """The tensors that make up the model: without buffers, and without a head that is the tied embedding again.

    Args:
        stored: the tensors of the main shards.
        expected: the names of the weight table.

    Raises:
        CheckpointError: the head is another than the embedding, the weights are quantised, or their names have another
            beginning than this layout's; it names the first.
    """
    check_not_quantised(folder, stored, expected)
    check_prefixes(folder, stored.keys() - expected, expected - stored.keys())
    found = {name: held for name, held in stored.items() if name in expected or not _BUFFERS.fullmatch(name)}
    if HEAD in found and HEAD not in expected:
        head = found.pop(HEAD)
        embedding = found.setdefault(EMBEDDING, head)  # tools that save shared tensors once may keep either name
        _check_tied(folder, head, embedding)
    return found


def check_not_quantised(folder: Path, stored: Mapping[str, Stored], expected: Set[str]) -> None:
    """Refuse quantised weights, known by a file, by a tensor's dtype or by what goes with it.

    Raises:
        CheckpointError: they are; it names the sign.
    """
    for name in _QUANTISED_FILES:
        if (folder / name).exists():
            raise CheckpointError(
                f"{folder / name}: says that the weights are quantised, which is not supported; {DEQUANTISE}. If they "
                "are not, remove the file"
            )
    signs = [f"{name}: has dtype {held.dtype}" for name, held in stored.items() if held.dtype not in _PLAIN]
    signs += [f"{n}: is there" for n in stored if n not in expected and _QUANTISED_NAME.fullmatch(n)]
    if signs:
        more = f" and {len(signs) - 1} more" if len(signs) > 1 else ""
        raise CheckpointError(
            f"{folder}: {signs[0]}{more}: the weights are quantised, which is not supported; {DEQUANTISE}"
        )


def check_prefixes(place: Path, names: Set[str], missing: Set[str], root: str = "model.") -> None:
    """Refuse names with something before them, or within them, that a wrapper has put there.

    Args:
        place: the folder or file, for errors.
        names: of tensors that are not in the weight table.
        missing: of tensors in the table that are not there.
        root: how the latter begin, which may be missing as well.

    Raises:
        CheckpointError: there are such; it names the first, and what it stands for.
    """
    tails = {name.removeprefix(root): name for name in missing}
    wrappers = _WRAPPERS.keys() - set(root.split("."))
    prefixes: Counter[str] = Counter()
    examples: dict[str, tuple[str, str]] = {}
    for name in sorted(names):
        plain = ".".join(part for part in name.split(".") if part not in wrappers)
        if plain in missing and plain != name:
            extra = next(part for part in name.split(".") if part in wrappers)
            prefix, meant = f"{extra}.", plain
        else:
            tail = next((tail for tail in _tails(name) if tail in tails), None)
            if tail is None:
                continue
            prefix, meant = name.removesuffix(tail), tails[tail]
        prefixes[prefix] += 1
        examples.setdefault(prefix, (name, meant))
    if not prefixes:
        return
    prefix, count = prefixes.most_common(1)[0]
    name, meant = examples[prefix]
    if prefix.endswith(".model."):
        prefix = prefix.removesuffix("model.")
    wrapper = next((why for part, why in _WRAPPERS.items() if part in wrappers.intersection(prefix.split("."))), None)
    fault = f"the prefix {prefix!r}" if prefix else f"no prefix {root!r}"
    raise CheckpointError(
        f"{place}: the names of {count} tensors have {fault}, which this layout's have not: {name} in place of "
        f"{meant}. {f'It is {wrapper}; or' if wrapper else 'Save the model itself with save_pretrained(FOLDER), or'} "
        "rename the tensors"
    )


def _tails(name: str) -> Iterator[str]:
    """Yield the ends of a name, from the longest on, the name itself first."""
    parts = name.split(".")
    yield from (".".join(parts[i:]) for i in range(len(parts)))


def _check_tied(folder: Path, head: Stored, embedding: Stored) -> None:
    """Check that the head's weights are the embedding's, which the model has once."""

    def is_same(rows: tuple[int, int]) -> bool:
        first, second = head.rows(*rows), embedding.rows(*rows)
        if head.dtype == embedding.dtype:
            return np.array_equal(first.view(np.uint8), second.view(np.uint8))
        return np.array_equal(first.astype(np.float32), second.astype(np.float32))

    rows = embedding.shape[0]
    if head.shape != embedding.shape:
        problem = f"has shape {head.shape}, and {EMBEDDING} has {embedding.shape}"
    else:
        step = max(1, (32 << 20) * rows // embedding.nbytes)
        with ThreadPoolExecutor(2) as pool:
            same = all(pool.map(is_same, ((at, min(at + step, rows)) for at in range(0, rows, step))))
        problem = None if same else f"differs from {EMBEDDING}"
    if problem is not None:
        raise CheckpointError(
            f"{folder}: {HEAD} {problem}, but only a head that is tied to the embedding is supported; train with "
            "tie_word_embeddings true, or, where the embedding is what was meant, remove the tensor"
        )
