"""Text to token ids and back: a byte-level BPE built from the checkpoint folder's own files and run by tiktoken.

Two layouts are read: `tokenizer.json`, or `vocab.json` with `merges.txt`. Both state a BPE as a list of pairs to merge,
first pair first; tiktoken merges whatever neighbours make up a token, lowest id first. The two agree when the merges
stand in the order of the ids of what they make, and when tiktoken knows exactly those tokens that the merges can form.
`from_folder` checks the first and arranges the second, so the ids are those of the `tokenizers` library, or the folder
is refused.
"""

import itertools
import json
import operator
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import numpy as np
import tiktoken

from phi4mm_jax.errors import CheckpointError, InputError

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

# What lstrip and rstrip swallow: Unicode's White_Space property. (`str.strip` alone would also take U+001C to U+001F.)
WHITE_SPACE = "".join(map(chr, (*range(9, 14), 32, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B)))) + (
    "\u2028\u2029\u202f\u205f\u3000"
)

MAX_ID = 2**24  # far above any vocabulary; keeps a damaged file from asking for tables of gigabytes


@dataclass(frozen=True)
class SpecialToken:
    """A token that stands for itself and is never formed from text.

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


# Tokens of the published tokenizers that structure a prompt, some of which their files do not mark as special.
_CONTROL = re.compile(
    r"<\|/?(endoftext\d*|endofprompt|end|assistant|user|system|tool|tool_call|tool_response|tag|dummy_\d+)\|>"
)


_WORD_CATEGORIES = {"Nd", "Nl", "Pc"}  # and letters and marks
_WORD_OTHERS = {0x200C, 0x200D, *range(0x24B6, 0x24EA), *range(0x1F130, 0x1F14A), *range(0x1F150, 0x1F16A)} | {
    *range(0x1F170, 0x1F18A)
}


def _is_word(character: str) -> bool:
    """Whether a character is of a word: Unicode's \\w, which the `tokenizers` library goes by. (Python's has other
    numbers, and no marks.)"""
    category = unicodedata.category(character)
    return category[0] in "LM" or category in _WORD_CATEGORIES or ord(character) in _WORD_OTHERS


def _finders(tokens: Sequence[SpecialToken]) -> list[re.Pattern[str]]:
    """Patterns that find tokens in texts, one after the other. The longest comes first: where two tokens begin at one
    place, the longer is meant."""
    return [
        re.compile("|".join(re.escape(content) for content in sorted(contents, key=len, reverse=True)))
        for late in (False, True)
        if (contents := [token.content for token in tokens if token.late is late])
    ]


def _joined(pieces: Iterable[Any]) -> list[Any]:
    """Pieces with neighbouring texts as one."""
    joined: list[Any] = []
    for piece in pieces:
        if isinstance(piece, str) and joined and isinstance(joined[-1], str):
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined


class Tokenizer:
    """The tokenizer of one checkpoint, made by `Tokenizer.from_folder`. It never changes: threads may share it.

    `special_tokens`: id by content. `vocab_size`: the largest id of a token, plus one.
    """

    def __init__(
        self,
        encoding: tiktoken.Encoding,
        token_bytes: Mapping[int, bytes],
        special: Sequence[SpecialToken],
        model_vocab_size: int = 0,
    ):
        """`encoding` turns plain text into ids; `token_bytes` has the bytes of every id that text can become, and of
        any other to be decoded; `model_vocab_size` is the number of rows of the model's embedding, 0 if unknown."""
        self._encoding = encoding
        self._special = {token.id: token for token in special}
        self._bytes = dict(token_bytes) | {token.id: token.content.encode() for token in special}
        self._skipped = frozenset(token.id for token in special if token.skip)
        self._finders = _finders(special)
        self._added = _finders([t for t in special if not t.skip and not _CONTROL.fullmatch(t.content)])
        self._ids = {token.content: token.id for token in special}
        self.vocab_size: int = max(self._bytes) + 1
        self._id_range = max(self.vocab_size, model_vocab_size)

    @property
    def special_tokens(self) -> Mapping[str, int]:
        return MappingProxyType(self._ids)

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """Reads `tokenizer.json`, else `vocab.json` and `merges.txt`, of a checkpoint folder.

        With the latter, special tokens come from `added_tokens_decoder` of `tokenizer_config.json`, else from
        `added_tokens.json` and `special_tokens_map.json`, and text is split by o200k_base's pattern. `vocab_size` of
        `config.json`, where there is one, says how far ids may go (see `decode_bytes`). Raises CheckpointError if a
        file is missing, broken, or states anything but a byte-level BPE that tiktoken reproduces exactly.
        """
        folder = Path(folder)
        if (folder / "tokenizer.json").is_file():
            files = _read_tokenizer_json(folder / "tokenizer.json")
        elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            files = _read_vocab_and_merges(folder)
        else:
            found = [name for name in ("tokenizer.json", "vocab.json", "merges.txt") if (folder / name).exists()]
            raise CheckpointError(
                f"{folder}: no tokenizer. Looked for tokenizer.json, or vocab.json together with merges.txt; found "
                f"{', '.join(found) or 'none of them'}. Copy the tokenizer files of the published checkpoint here."
            )
        model_vocab_size = _model_vocab_size(folder / "config.json")
        tokenizer = _build(cls, files, model_vocab_size)
        if 0 < model_vocab_size < tokenizer.vocab_size:
            ids = tokenizer.vocab_size
            _fail(
                files.path,
                f"its ids go to {ids - 1}, and vocab_size of config.json is only {model_vocab_size}",
                "If tokens were added, save the model after model.resize_token_embeddings(len(tokenizer)); else copy "
                "the tokenizer that belongs to this model here.",
            )
        return tokenizer

    def encode(self, text: str, special: bool = False) -> list[int]:
        """The ids of `text`. With `special` the special tokens in it are recognised; otherwise all of it is plain text,
        `<|end|>` too, but for tokens that a fine-tuner added as vocabulary. Raises InputError as `encode_pieces`."""
        return self.encode_pieces(self.split_special(text) if special else [text])

    def split_special(self, text: str) -> list[str | int]:
        """Cuts a raw prompt at its special tokens: plain text as strings, special tokens as ids, in order. White space
        is left for `encode_pieces` to swallow."""
        if not isinstance(text, str):
            raise InputError(f"text is {type(text).__name__}, not a string: pass a str")
        return self._split_by(self._finders, [text])

    def _split_by(self, finders: Sequence[re.Pattern[str]], pieces: Sequence[Any]) -> list[Any]:
        for finder in finders:
            pieces = [part for piece in pieces for part in self._split(finder, piece)]
        return list(pieces)

    def _split(self, finder: re.Pattern[str], piece: Any) -> Iterable[Any]:
        if not isinstance(piece, str):
            yield piece
            return
        end = 0
        for match in finder.finditer(piece):
            beside = piece[max(match.start() - 1, 0) : match.start()] + piece[match.end() : match.end() + 1]
            if self._special[self._ids[match.group()]].single_word and any(map(_is_word, beside)):
                continue
            if match.start() > end:
                yield piece[end : match.start()]
            yield self._ids[match.group()]
            end = match.end()
        if end < len(piece):
            yield piece[end:]

    def encode_pieces(self, pieces: Sequence[str | int | tuple[int, ...]]) -> list[int]:
        """The ids of a sequence of plain texts (str), special tokens (int) and ids that are taken as they are (tuple).

        Neighbouring texts are one text: tokens form across their boundary, and added tokens that are not special are
        found in it, as transformers does. A special token swallows the white space of
        neighbouring text as its flags say. Raises InputError for an id that is no special token, and for a text that is
        not valid Unicode or has a run of white space too long for the regular expression engine (over half a million).
        """
        if self._added:
            pieces = self._split_by(self._added, _joined(pieces))
        ids: list[int] = []
        texts: list[str] = []
        swallow = ""  # what the last special token takes from the text after it
        for piece in pieces:
            if isinstance(piece, str):
                texts.append(piece)
                continue
            if isinstance(piece, tuple):
                ids += self._encode_text("".join(texts).lstrip(swallow))
                ids += piece
                texts, swallow = [], ""
                continue
            token = self._special_token(piece)
            text = "".join(texts).lstrip(swallow)
            ids += self._encode_text(text.rstrip(WHITE_SPACE) if token.lstrip else text)
            ids.append(token.id)
            texts, swallow = [], WHITE_SPACE if token.rstrip else ""
        return ids + self._encode_text("".join(texts).lstrip(swallow))

    def _special_token(self, piece: Any) -> SpecialToken:
        try:
            token = self._special.get(operator.index(piece))
        except TypeError:
            kind = type(piece).__name__
            raise InputError(f"a piece is {kind}: pass text as str and special tokens as int ids") from None
        if token is None:
            raise InputError(f"id {piece} is not a special token: pass text as str, and only ids among special_tokens")
        return token

    def _encode_text(self, text: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"text is not valid Unicode: lone surrogate U+{ord(text[error.start]):04X} at character {error.start}. "
                'Repair it with text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")'
            ) from None
        try:
            # Not encode_ordinary: that one aborts, rather than raises, when the regular expression runs out of stack.
            return self._encoding.encode(text, disallowed_special=())
        except ValueError as error:
            raise InputError(
                f"text of {len(text)} characters has too long a run of white space ({error}): shorten the run"
            ) from None

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD. Otherwise as `decode_bytes`."""
        return self.decode_bytes(ids, skip_special).decode(errors="replace")

    def decode_bytes(self, ids: Iterable[int], skip_special: bool = False) -> bytes:
        """The bytes of `ids`, which may end within a character.

        `skip_special` leaves out the tokens that the tokenizer's file marks as special; other added tokens stay. The
        model's vocabulary is padded: an id that has a row in the embedding but no token is empty. Raises InputError for
        an id beyond both, negative or not an integer.
        """
        chunks = []
        for id_ in ids:
            try:
                index = operator.index(id_)
            except TypeError:
                raise InputError(f"id {id_!r} is {type(id_).__name__}, not an integer: pass token ids") from None
            if not 0 <= index < self._id_range:
                raise InputError(f"id {index} is out of range: ids go from 0 to {self._id_range - 1}")
            if not (skip_special and index in self._skipped):
                chunks.append(self._bytes.get(index, b""))
        return b"".join(chunks)


# Reading. Both layouts come to the same thing.


@dataclass(frozen=True)
class _Files:
    """What a folder says. Merge i joins the tokens spelled `left[i]` and `right[i]`; tiktoken splits by `pattern`."""

    path: Path
    vocab: dict[str, int]
    left: Sequence[str]
    right: Sequence[str]
    pattern: str
    special: list[SpecialToken]
    ignore_merges: bool = False

    def merge(self, at: int) -> str:
        return f"merge {at} ({self.left[at]!r}, {self.right[at]!r})"


def _fail(path: Path, cause: str, remedy: str = "Copy the file of the published checkpoint again.") -> NoReturn:
    raise CheckpointError(f"{path}: {cause}. {remedy}")


def _unsupported(path: Path, cause: str) -> NoReturn:
    _fail(path, cause, "Only a byte-level BPE like the published checkpoint's is supported: use its tokenizer files.")


def _load_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        _fail(path, f"cannot be read ({error})")


def _load_json(path: Path) -> dict[str, Any]:
    text = _load_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        _fail(path, f"is not valid JSON ({error})")
    if not isinstance(content, dict):
        _fail(path, f"holds a JSON {type(content).__name__} instead of an object")
    return content


def _model_vocab_size(path: Path) -> int:
    size = _load_json(path).get("vocab_size", 0) if path.is_file() else 0
    if not isinstance(size, int) or not 0 <= size <= MAX_ID:
        _fail(path, f"vocab_size is {size!r}, not a number of tokens")
    return size


def _read_tokenizer_json(path: Path) -> _Files:
    content = _load_json(path)
    model = content.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        _unsupported(path, "the model is not a BPE")
    for key in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            _unsupported(path, f"the model has {key} {model[key]!r}")
    if content.get("normalizer") is not None:
        _unsupported(path, "the text would be normalized")
    _check_adds_nothing(path, content.get("post_processor"))
    vocab, merges, added = model.get("vocab"), model.get("merges"), content.get("added_tokens", [])
    if not isinstance(vocab, dict) or not isinstance(merges, list) or not isinstance(added, list):
        _fail(path, "model.vocab, model.merges or added_tokens is missing or of another type")
    pattern = _split_pattern(path, content.get("pre_tokenizer"))
    special = [_special_token(path, token, token.get("id") if isinstance(token, dict) else None) for token in added]
    return _Files(path, vocab, *_pairs(path, merges), pattern, special, bool(model.get("ignore_merges")))


def _pairs(path: Path, merges: list[Any]) -> tuple[Sequence[str], Sequence[str]]:
    """The left and the right tokens of merges spelled "a b" or, as newer files do, ["a", "b"]."""
    kinds, tokens = set(map(type, merges)), merges
    if kinds == {str} and {merge.count(" ") for merge in merges} == {1}:
        tokens = " ".join(merges).split(" ")
    elif kinds == {list} and set(map(len, merges)) == {2}:
        tokens = list(itertools.chain.from_iterable(merges))
    elif merges:
        tokens = [""]
    if not set(map(type, tokens)) <= {str} or not all(tokens):
        _fail(path, "a merge is not a pair of tokens, or the merges are not all spelled in one way")
    return tokens[::2], tokens[1::2]


def _check_adds_nothing(path: Path, processor: Any) -> None:
    """A post-processor may trim offsets, but must not put tokens around the text."""
    match processor:
        case None | {"type": "ByteLevel"}:
            return
        case {"type": "TemplateProcessing", "single": [{"Sequence": _}]}:
            return
        case {"type": "Sequence", "processors": list(processors)}:
            for inner in processors:
                _check_adds_nothing(path, inner)
        case _:
            _unsupported(path, "the post_processor would add tokens to the text")


def _split_pattern(path: Path, pre_tokenizer: Any) -> str:
    """tiktoken takes the matches of a pattern and drops what is between them, as does "Removed" with `invert`.
    "Isolated" keeps what is between two matches as a piece of its own, which a last alternative does here."""
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
    _unsupported(path, "the pre_tokenizer is not a Split into the matches of a regular expression, then ByteLevel")


def _special_token(path: Path, token: Any, id_: Any) -> SpecialToken:
    match token:
        case {"content": str(content)} if content and isinstance(id_, int) and 0 <= id_ < MAX_ID:
            pass
        case _:
            _fail(path, f"special token {token!r} needs a content and an id from 0 to {MAX_ID - 1}")
    if re.search("[\ud800-\udfff]", content):
        _fail(path, f"special token {content!r} is not valid Unicode")
    default = {"lstrip": False, "rstrip": False, "special": True, "normalized": False, "single_word": False}
    flags = {key: token.get(key, default[key]) for key in default}
    if not all(isinstance(flag, bool) for flag in flags.values()):
        _fail(path, f"special token {content!r} has a flag that is neither true nor false")
    return SpecialToken(
        id_, content, flags["lstrip"], flags["rstrip"], flags["special"], flags["normalized"], flags["single_word"]
    )


def _read_vocab_and_merges(folder: Path) -> _Files:
    path = folder / "merges.txt"
    lines = _load_text(path).split("\n")
    merges = [line for line in lines if line.strip() and not line.startswith("#version")]
    vocab = _load_json(folder / "vocab.json")
    return _Files(path, vocab, *_pairs(path, merges), O200K_PATTERN, _special_tokens_beside(folder, vocab))


def _special_tokens_beside(folder: Path, vocab: Mapping[str, Any]) -> list[SpecialToken]:
    path = folder / "tokenizer_config.json"
    tokens = _load_json(path).get("added_tokens_decoder") if path.is_file() else None
    if tokens is not None:
        if not isinstance(tokens, dict) or not all(re.fullmatch("[0-9]{1,9}", key) for key in tokens):
            _fail(path, "added_tokens_decoder is not a table of tokens by id")
        return [_special_token(path, token, int(id_)) for id_, token in tokens.items()]

    path = folder / "added_tokens.json"
    ids: dict[str, Any] = _load_json(path) if path.is_file() else {}
    tokens = {content: {"content": content} for content in ids}
    path = folder / "special_tokens_map.json"
    entries = _load_json(path).values() if path.is_file() else ()
    for entry in (item for value in entries for item in (value if isinstance(value, list) else [value])):
        token = {"content": entry} if isinstance(entry, str) else entry
        if not isinstance(token, dict) or not isinstance(token.get("content"), str):
            _fail(path, f"{entry!r} is not a token")
        if isinstance(entry, dict) or token["content"] not in tokens:
            tokens[token["content"]] = token
    return [_special_token(path, token, ids.get(content, vocab.get(content))) for content, token in tokens.items()]


# Building.


def _build(cls: type[Tokenizer], files: _Files, model_vocab_size: int) -> Tokenizer:
    contents = {token.content for token in files.special}
    names = [name for name in files.vocab if name not in contents]
    numbers = [files.vocab[name] for name in names]
    if set(map(type, numbers)) != {int} or min(numbers) < 0 or max(numbers) >= MAX_ID:
        _fail(files.path, f"a token's id is not an integer from 0 to {MAX_ID - 1}, or there are no tokens")
    ids = np.array(numbers)
    for token in files.special:
        if files.vocab.get(token.content, token.id) != token.id:
            _fail(files.path, f"special token {token.content!r} has id {token.id} and {files.vocab[token.content]}")
    every, count = np.unique([*ids, *(token.id for token in files.special)], return_counts=True)
    if count.max() > 1:
        _fail(files.path, f"two tokens have the id {every[count > 1][0]}")

    spelled = _token_bytes(files.path, names)
    length = np.zeros(ids.max() + 1, np.int64)
    length[ids] = [len(token) for token in spelled]
    if np.count_nonzero(length == 1) != 256:
        _unsupported(files.path, f"{np.count_nonzero(length == 1)} of the 256 single bytes are tokens")
    left, right, whole = _merge_ids(files, dict(zip(names, numbers, strict=True)))
    # A merge of a part that is formed later than the whole (bytes are there from the start) comes too late to be used:
    # by then the whole has been formed by another merge. If there is no other, ids and time do not go together.
    useless = (left > whole) & (length[left] > 1) | (right > whole) & (length[right] > 1)
    formed = _formed(left[~useless], right[~useless], whole[~useless], length)
    only = useless & formed[left] & formed[right] & ~formed[whole]
    if only.any():
        _out_of_turn(files, whole, int(np.argmax(only)))
    if files.ignore_merges and np.count_nonzero(formed) < len(ids):
        _unsupported(files.path, "it has tokens that no merge forms, and ignore_merges")

    token_bytes = dict(zip(numbers, spelled, strict=True))
    ranks = {token: id_ for id_, token in token_bytes.items() if formed[id_]}
    try:
        encoding = tiktoken.Encoding(files.path.name, pat_str=files.pattern, mergeable_ranks=ranks, special_tokens={})
    except ValueError as error:
        _unsupported(files.path, f"tiktoken cannot compile the pattern {files.pattern!r} ({error})")
    return cls(encoding, token_bytes, files.special, model_vocab_size)


def _token_bytes(path: Path, names: Sequence[str]) -> list[bytes]:
    """The bytes of tokens spelled in the byte-level alphabet.

    The alphabet (GPT-2's) spells a byte by the character of its own number if that is printable and not a space, and by
    the next free character from U+0100 on otherwise.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = np.full(0x100 + len(others) + 1, -1, np.int16)  # its last entry stands for all characters beyond
    table[printable] = printable
    table[0x100:-1] = others

    characters = np.frombuffer("".join(names).encode("utf-32-le", "surrogatepass"), np.uint32)
    ends = np.cumsum([len(name) for name in names])
    values = table[np.minimum(characters, len(table) - 1)]
    if (values < 0).any():
        name = names[int(np.searchsorted(ends, np.argmin(values), side="right"))]
        _unsupported(path, f"token {name!r} is not spelled in the byte-level alphabet")
    blob = values.astype(np.uint8).tobytes()
    return [blob[start:end] for start, end in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True)]


def _merge_ids(files: _Files, vocab: Mapping[str, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The ids of what each merge joins, (M,) left and (M,) right, and of what it makes, (M,)."""
    spelled = files.left, files.right, map(operator.add, files.left, files.right)
    left, right, whole = (np.fromiter(map(vocab.get, names, itertools.repeat(-1)), np.int64) for names in spelled)
    unknown = (left < 0) | (right < 0) | (whole < 0)
    if unknown.any():
        at = int(np.argmax(unknown))
        _fail(files.path, f"{files.merge(at)} joins or makes a token that the vocabulary does not have")
    if (whole[1:] < whole[:-1]).any():
        _out_of_turn(files, whole, int(np.argmax(whole[1:] < whole[:-1])) + 1)
    return left, right, whole


def _out_of_turn(files: _Files, whole: np.ndarray, at: int) -> NoReturn:
    cause = f"{files.merge(at)} makes token {whole[at]} out of turn"
    _unsupported(files.path, f"{cause}; tiktoken needs the merges in the order of the ids of what they make")


def _formed(left: np.ndarray, right: np.ndarray, whole: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Which tokens the merges form from their own bytes, (V,) bool, given the (V,) number of bytes of each.

    A token is formed if it is a byte, or if a merge makes it of two formed tokens whose own merges are not disturbed by
    being neighbours. Only then can the token come up in any text, since what is merged within a span of text does not
    depend on what is around it, as long as nothing is merged across its ends. For the same reason a formed token is
    always made of the same two parts, so tiktoken, which looks only at what two neighbours make up, merges the same.
    """
    size = len(length)
    keys, first = np.unique(left * size + right, return_index=True)
    made = whole[first]
    parts = np.full((2, size), -1)
    formed = length == 1
    born = np.where(formed, -1, np.arange(size))  # when a token is formed, as the id of the merge's result

    def made_of(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        key = x * size + y
        at = np.minimum(np.searchsorted(keys, key), len(keys) - 1)
        return np.where(keys[at] == key, made[at], size)

    def undisturbed(left: np.ndarray, right: np.ndarray, whole: np.ndarray) -> np.ndarray:
        """Goes back in time from the final neighbours, undoing whichever was formed last, and looks at each pair facing
        each other across the boundary: would a merge have taken it before its own sides did? Ties go to the left."""
        calm = np.ones(len(whole), bool)
        at, x, y, x_until, y_until = np.arange(len(whole)), left, right, whole, whole
        while True:
            on = np.maximum(born[x], born[y]) >= 0
            at, x, y, x_until, y_until = at[on], x[on], y[on], x_until[on], y_until[on]
            if not len(at):
                return calm
            undo_x = born[x] > born[y]
            x_until, y_until = np.where(undo_x, x, x_until), np.where(undo_x, y_until, y)
            x, y = np.where(undo_x, parts[1, x], x), np.where(undo_x, y, parts[0, y])
            across = made_of(x, y)
            taken = (across < x_until) & (across <= y_until)
            calm[at[taken]] = False

    # Shorter tokens first: whether a token is formed depends on shorter ones only.
    by_length = np.argsort(length[whole], kind="stable")
    for group in np.split(by_length, np.flatnonzero(np.diff(length[whole[by_length]])) + 1):
        group = group[formed[left[group]] & formed[right[group]]]
        group = group[undisturbed(left[group], right[group], whole[group])]
        parts[:, whole[group]] = left[group], right[group]
        formed[whole[group]] = True
    return formed
