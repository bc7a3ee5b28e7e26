"""Tokenizer files of a checkpoint folder: `tokenizer.json`, or `vocab.json` with `merges.txt`."""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from phi4mm_jax.config import read_json, read_optional_json
from phi4mm_jax.errors import CheckpointError
from phi4mm_jax.utils.checks import is_whole

# How o200k_base cuts text into the pieces within which tokens are formed; `vocab.json` and `merges.txt` do not say it.
O200K_PATTERN = "|".join(
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)

# How GPT-2 does. transformers 5 loads the published tokenizer by that class, and saves it with this split.
_GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# Settings of tokenizer_config.json that name tokens; transformers adds those that there are not.
_NAMING_TOKENS = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
    "additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens",
)  # fmt: skip

_SPLITTING = {  # settings of tokenizer_config.json that must not be set, with what they would do
    "split_special_tokens": "special tokens would be text",
    "add_prefix_space": "text would begin with a space",
}

_SETTINGS = "tokenizer_config.json"

MAX_ID = 2**24  # far above any vocabulary; keeps a damaged file from asking for tables of gigabytes


@dataclass(frozen=True)
class SpecialToken:
    """Token that stands for itself and is never formed from text.

    `lstrip`, `rstrip`: it swallows the white space before, after it. `skip`: `decode(skip_special=True)` leaves it out
    (the file's `special`). `late`: it is looked for only in what the others left (the file's `normalized`).
    `single_word`: it is not recognised beside a character of a word.
    """

    id: int
    content: str
    lstrip: bool = False
    rstrip: bool = False
    skip: bool = True
    late: bool = False
    single_word: bool = False


@dataclass(frozen=True)
class TokenizerFiles:
    """Content of a folder's tokenizer files.

    Merge i joins the tokens spelled `left[i]` and `right[i]`; tiktoken splits by `pattern`.
    """

    path: Path
    vocab: dict[str, int]
    left: Sequence[str]
    right: Sequence[str]
    pattern: str
    special: list[SpecialToken]
    ignore_merges: bool = False

    def merge(self, at: int) -> str:
        """Name a merge, for an error."""
        return f"merge {at} ({self.left[at]!r}, {self.right[at]!r})"


def refuse(path: Path, cause: str, remedy: str = "Copy the file of the published checkpoint again.") -> NoReturn:
    """Raise a CheckpointError that names the file, the cause and the remedy."""
    raise CheckpointError(f"{path}: {cause}. {remedy}")


def refuse_kind(path: Path, cause: str) -> NoReturn:
    """Raise a CheckpointError: the tokenizer is of an unsupported kind."""
    refuse(path, cause, "Only a byte-level BPE like the published checkpoint's is supported: use its tokenizer files.")


def read_vocab_size(path: Path) -> int:
    """Return the vocabulary size that a `config.json` states; 0 if it states none.

    Raises:
        CheckpointError: it is not a number of tokens.
    """
    size = read_optional_json(path).get("vocab_size", 0)
    if not is_whole(size, 0, MAX_ID):
        refuse(path, f"vocab_size is {size!r}, not a number of tokens")
    return size


def read_tokenizer_files(folder: Path) -> TokenizerFiles:
    """Read `tokenizer.json`, else `vocab.json` and `merges.txt`.

    Raises:
        CheckpointError: a file is missing, broken, or states something else than a byte-level BPE.
    """
    settings = _read_settings(folder)
    if (folder / "tokenizer.json").is_file():
        return _read_tokenizer_json(folder / "tokenizer.json", settings)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return _read_vocab_and_merges(folder, settings)
    found = [name for name in ("tokenizer.json", "vocab.json", "merges.txt") if (folder / name).exists()]
    raise CheckpointError(
        f"{folder}: no tokenizer. Looked for tokenizer.json, or vocab.json together with merges.txt; found "
        f"{', '.join(found) or 'none of them'}. Copy the tokenizer files of the model that this one was tuned from "
        "here, or of the published checkpoint."
    )


def _read_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of tokenizer_config.json; refuse those by which transformers would split text otherwise."""
    settings = read_optional_json(folder / _SETTINGS)
    for key, effect in _SPLITTING.items():
        if settings.get(key):
            refuse(folder / _SETTINGS, f"{key} is set, so {effect}", "Take it out.")
    return settings


def _read_tokenizer_json(path: Path, settings: Mapping[str, Any]) -> TokenizerFiles:
    content = read_json(path)
    model = content.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        refuse_kind(path, "the model is not a BPE")
    for key in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            refuse_kind(path, f"the model has {key} {model[key]!r}")
    if content.get("normalizer") is not None:
        refuse_kind(path, "the text would be normalized")
    _check_adds_nothing(path, content.get("post_processor"))
    vocab, merges, added = model.get("vocab"), model.get("merges"), content.get("added_tokens", [])
    if not isinstance(vocab, dict) or not isinstance(merges, list) or not isinstance(added, list):
        refuse(path, "model.vocab, model.merges or added_tokens is missing or of another type")
    pattern = _split_pattern(path, content.get("pre_tokenizer"))
    special = [_special_token(path, token, token.get("id") if isinstance(token, dict) else None) for token in added]
    special = _as_configured(path.parent, settings, vocab, special)
    return TokenizerFiles(path, vocab, *_pairs(path, merges), pattern, special, bool(model.get("ignore_merges")))


def _as_configured(
    folder: Path, settings: Mapping[str, Any], vocab: Mapping[str, Any], special: list[SpecialToken]
) -> list[SpecialToken]:
    """Return the special tokens as transformers has them, by the settings beside tokenizer.json.

    Their flags are those of `added_tokens_decoder`. Tokens that are only named there are refused: transformers would
    add them.
    """
    path = folder / _SETTINGS
    found = {token.content: token for token in special}
    named = {path: [settings.get(key) for key in _NAMING_TOKENS]}
    if (stated := settings.get("added_tokens_decoder")) is not None:
        for token in _tokens_by_id(path, stated):
            known = found.get(token.content)
            id_ = vocab.get(token.content) if known is None else known.id
            if id_ is None:
                _refuse_unknown(path, token.content)
            if id_ != token.id:
                refuse(path, f"added_tokens_decoder has {token.content!r} as {token.id}, and tokenizer.json as {id_}")
            found[token.content] = replace(token, skip=token.skip or (known is not None and known.skip))
    else:
        for name in ("special_tokens_map.json", "added_tokens.json"):
            tokens = read_optional_json(folder / name)
            named[folder / name] = [list(tokens)] if name == "added_tokens.json" else list(tokens.values())
    for file, values in named.items():
        for token in (token for value in values for token in _each_token(value)):
            if token not in found:
                _refuse_unknown(file, token)
    return list(found.values())


def _each_token(value: Any) -> list[Any]:
    """Return the contents of the tokens that a setting names: one, a list of them, or a table by their purpose."""
    match value:
        case None:
            return []
        case {"content": content}:
            return [content]
        case list() | dict():
            several = value.values() if isinstance(value, dict) else value
            return [content for token in several for content in _each_token(token)]
    return [value]


def _refuse_unknown(path: Path, content: Any) -> NoReturn:
    refuse(
        path,
        f"names the token {content!r:.80}, which is not among the added_tokens of tokenizer.json",
        "Save the tokenizer by transformers (save_pretrained), or take the token out.",
    )


def _pairs(path: Path, merges: list[Any]) -> tuple[Sequence[str], Sequence[str]]:
    """Return the left and the right tokens of merges spelled "a b" or, as newer files do, ["a", "b"]."""
    kinds, tokens = set(map(type, merges)), merges
    if kinds == {str} and {merge.count(" ") for merge in merges} == {1}:
        tokens = " ".join(merges).split(" ")
    elif kinds == {list} and set(map(len, merges)) == {2}:
        tokens = list(itertools.chain.from_iterable(merges))
    elif merges:
        tokens = [""]
    if not set(map(type, tokens)) <= {str} or not all(tokens):
        refuse(path, "a merge is not a pair of tokens, or the merges are not all spelled in one way")
    return tokens[::2], tokens[1::2]


def _check_adds_nothing(path: Path, processor: Any) -> None:
    """Refuse a post-processor that puts tokens around the text; it may trim offsets."""
    match processor:
        case None | {"type": "ByteLevel"}:
            return
        case {"type": "TemplateProcessing", "single": [{"Sequence": _}]}:
            return
        case {"type": "Sequence", "processors": list(processors)}:
            for inner in processors:
                _check_adds_nothing(path, inner)
        case _:
            refuse_kind(path, "the post_processor would add tokens to the text")


def _split_pattern(path: Path, pre_tokenizer: Any) -> str:
    """Return the pattern whose matches tiktoken is to take as pieces.

    It takes the matches of a pattern and drops what is between them, as does "Removed" with `invert`.
    "Isolated" keeps what is between two matches as a piece of its own, which a last alternative does here.
    """
    match pre_tokenizer:
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": str(behavior), "invert": bool(invert)},
                {"type": "ByteLevel", "use_regex": False, "add_prefix_space": False},
            ],
        } if behavior == "Isolated" or (behavior == "Removed" and invert):
            return regex if behavior == "Removed" else rf"(?:{regex})|(?:(?!{regex})[\s\S])+"
        case {"type": "ByteLevel", "use_regex": True, "add_prefix_space": False}:
            return _GPT2_PATTERN
    refuse_kind(path, "the pre_tokenizer is not a Split into the matches of a regular expression, then ByteLevel")


def _special_token(path: Path, token: Any, id_: Any) -> SpecialToken:
    match token:
        case {"content": str(content)} if content and is_whole(id_, 0, MAX_ID - 1):
            pass
        case _:
            refuse(path, f"special token {token!r} needs a content and an id from 0 to {MAX_ID - 1}")
    if re.search("[\ud800-\udfff]", content):
        refuse(path, f"special token {content!r} is not valid Unicode")
    default = {"lstrip": False, "rstrip": False, "special": True, "normalized": False, "single_word": False}
    flags = {key: token.get(key, default[key]) for key in default}
    if not all(isinstance(flag, bool) for flag in flags.values()):
        refuse(path, f"special token {content!r} has a flag that is neither true nor false")
    return SpecialToken(
        id_, content, flags["lstrip"], flags["rstrip"], flags["special"], flags["normalized"], flags["single_word"]
    )


def _read_vocab_and_merges(folder: Path, settings: Mapping[str, Any]) -> TokenizerFiles:
    path = folder / "merges.txt"
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        refuse(path, f"cannot be read ({error})")
    merges = [line for line in lines if line.strip() and not line.startswith("#version")]
    vocab = read_json(folder / "vocab.json")
    special = _special_tokens_beside(folder, settings, vocab)
    return TokenizerFiles(path, vocab, *_pairs(path, merges), O200K_PATTERN, special)


def _tokens_by_id(path: Path, tokens: Any) -> list[SpecialToken]:
    if not isinstance(tokens, dict) or not all(re.fullmatch("[0-9]{1,9}", key) for key in tokens):
        refuse(path, "added_tokens_decoder is not a table of tokens by id")
    return [_special_token(path, token, int(id_)) for id_, token in tokens.items()]


def _special_tokens_beside(folder: Path, settings: Mapping[str, Any], vocab: Mapping[str, Any]) -> list[SpecialToken]:
    if (stated := settings.get("added_tokens_decoder")) is not None:
        return _tokens_by_id(folder / _SETTINGS, stated)
    ids = read_optional_json(folder / "added_tokens.json")
    tokens: dict[str, Any] = {content: {"content": content} for content in ids}
    path = folder / "special_tokens_map.json"
    entries = read_optional_json(path).values()
    for entry in (item for value in entries for item in (value if isinstance(value, list) else [value])):
        token = {"content": entry} if isinstance(entry, str) else entry
        if not isinstance(token, dict) or not isinstance(token.get("content"), str):
            refuse(path, f"{entry!r} is not a token")
        if isinstance(entry, dict) or token["content"] not in tokens:
            tokens[token["content"]] = token
    return [_special_token(path, token, ids.get(content, vocab.get(content))) for content, token in tokens.items()]
