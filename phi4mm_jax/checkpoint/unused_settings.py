"""Settings of a checkpoint by which transformers would answer otherwise, and which are not used here."""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from phi4mm_jax.checkpoint.sidecar_files import chat_template_of, flattening, media_tokens
from phi4mm_jax.config import Phi4MMConfig, read_optional_json
from phi4mm_jax.errors import CheckpointError
from phi4mm_jax.processing.tokenizer import Tokenizer
from phi4mm_jax.utils.checks import is_number

# Keys of generation that change an answer, with the values that change none; null never does.
_ALWAYS: dict[str, tuple[Any, ...]] = {
    "do_sample": (False,), "num_beams": (1,), "repetition_penalty": (1,), "encoder_repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,), "encoder_no_repeat_ngram_size": (0,), "min_length": (0,), "min_new_tokens": (0,),
    "max_new_tokens": (), "max_time": (), "stop_strings": (), "bad_words_ids": (), "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],), "sequence_bias": ({},), "forced_bos_token_id": (), "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (), "guidance_scale": (1,), "token_healing": (False,),
    "watermarking_config": (), "dola_layers": (), "penalty_alpha": (0,), "constraints": (), "force_words_ids": (),
}  # fmt: skip
_SAMPLING: dict[str, tuple[Any, ...]] = {  # of answers that are sampled
    "temperature": (1,), "top_k": (0,), "top_p": (1,), "min_p": (0,), "typical_p": (1,), "top_h": (),
    "epsilon_cutoff": (0,), "eta_cutoff": (0,),
}  # fmt: skip
_BEAMS: dict[str, tuple[Any, ...]] = {
    "length_penalty": (1,), "early_stopping": (False,), "num_beam_groups": (1,), "diversity_penalty": (0,),
}  # fmt: skip

# Digests of chat templates by which the messages of a chat are rendered as here.
_TEMPLATES = {
    "febf589225c9728a",  # the release's
    "1bb1cdf903b8a570",  # with parts of contents, as transformers tests its processor
    "7ff060425a6a5a0b",  # the small model's, which has no tools
}


def unused_settings(folder: Path, config: Phi4MMConfig, tokenizer: Tokenizer) -> Iterator[str]:
    """Yield lines that a program says of settings in a checkpoint's folder that would change answers, and do not.

    Raises:
        CheckpointError: a file is not JSON.
    """
    path = folder / "generation_config.json"
    if not path.exists():  # in its place transformers reads what older checkpoints have in config.json
        path = folder / "config.json"
    values = read_optional_json(path)
    longest = config.decoder.rope.max_length
    meaning = _ALWAYS | (_SAMPLING if values.get("do_sample") else {})
    meaning |= _BEAMS if values.get("num_beams") not in (None, 1) else {}
    meaning["max_length"] = tuple(n for n in [values.get("max_length")] if is_number(n) and n >= longest)
    if unused := [key for key in meaning if values.get(key) is not None and values[key] not in meaning[key]]:
        yield (
            f"{path}: not used: {', '.join(f'{key} ({values[key]!r:.60})' for key in unused)}. Answers are greedy "
            "unless a request says how it samples and ends (phi4mm_jax.engine.Request, Sampling)"
        )
    yield from _unused_template(folder, *media_tokens(config, tokenizer))


def unused_of_adapter(folder: Path, tokenizer: Tokenizer) -> Iterator[str]:
    """Yield the same of what trainers save beside an adapter in its folder.

    Args:
        tokenizer: the base's, which reads all prompts.
    """
    yield from _unused_template(folder)
    try:
        added = dict(_added_tokens(folder))
    except CheckpointError as error:
        yield f"{error}. It is not used"
        return
    if others := [f"{token!r} ({id_})" for token, id_ in added.items() if tokenizer.special_tokens.get(token) != id_]:
        yield (
            f"{folder}: its tokenizer has tokens that the base's has not, by which prompts are read: "
            f"{', '.join(others[:5])}{', ...' * (len(others) > 5)}. If it was trained with them, put its tokenizer's "
            "files in the place of the base's"
        )


def _added_tokens(folder: Path) -> Iterator[tuple[str, int]]:
    """Yield the tokens that an adapter's folder adds to its vocabulary, with their ids, as far as they can be read."""
    listed = read_optional_json(folder / "tokenizer.json").get("added_tokens")
    stated = read_optional_json(folder / "tokenizer_config.json").get("added_tokens_decoder")
    beside: Any = read_optional_json(folder / "added_tokens.json").items()
    tokens = [each for each in listed if isinstance(each, Mapping)] if isinstance(listed, list) else []
    if isinstance(stated, Mapping):
        tokens += [
            {**each, "id": int(id_)} for id_, each in stated.items() if isinstance(each, Mapping) and id_.isdecimal()
        ]
    pairs = [*((each.get("content"), each.get("id")) for each in tokens), *beside]
    yield from (pair for pair in pairs if isinstance(pair[0], str) and isinstance(pair[1], int))


def _unused_template(folder: Path, image: str = "<|endoftext10|>", audio: str = "<|endoftext11|>") -> Iterator[str]:
    """Yield a line where the chat template of a checkpoint or an adapter is not the release's.

    Args:
        image, audio: the tokens that stand for media.
    """
    if not _is_known(folder, image, audio):
        yield (
            f"{folder}: its chat template is not the release's, and is not used: chats are rendered as by the "
            "release's. Give prompts that are rendered by it (apply_chat_template(..., tokenize=False)) as strings"
        )


def _is_known(folder: Path, image: str, audio: str) -> bool:
    try:
        template = chat_template_of(folder) or _default_of_several(folder)
    except CheckpointError:  # it cannot be read, so that it is none of the known ones
        return False
    if template is None:
        return True
    own = template.removeprefix(flattening(image, audio)).strip()  # exports have it in front
    return hashlib.sha256(own.encode("utf-8", "surrogatepass")).hexdigest()[:16] in _TEMPLATES


def _default_of_several(folder: Path) -> str | None:
    """Return the template that transformers takes of several by name; None where there are not several, or none."""
    stated = read_optional_json(folder / "tokenizer_config.json").get("chat_template")
    several = [each for each in stated if isinstance(each, Mapping)] if isinstance(stated, list) else []
    return next((each.get("template") for each in several if each.get("name") == "default"), None)
