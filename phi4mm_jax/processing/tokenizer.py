"""Text to token ids and back: the byte-level BPE of a checkpoint folder, run by tiktoken.

`tokenizer_files` reads the folder's files, `bpe` turns their merges into tiktoken's ranks.
"""

import operator
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import tiktoken

from phi4mm_jax.errors import InputError
from phi4mm_jax.processing.bpe import build_encoding
from phi4mm_jax.processing.tokenizer_files import SpecialToken, read_tokenizer_files, read_vocab_size, refuse

# What lstrip and rstrip swallow: Unicode's White_Space property. (`str.strip` alone would also take U+001C to U+001F.)
WHITE_SPACE = "".join(map(chr, (*range(9, 14), 32, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B)))) + (
    "\u2028\u2029\u202f\u205f\u3000"
)

# Tokens of the published tokenizers that structure a prompt, some of which their files do not mark as special.
_CONTROL = re.compile(r"<\|/?(endoftext\d*|endofprompt|end|assistant|user|system|tool|tool_call|tool_response|tag)\|>")


_WORD_CATEGORIES = {"Nd", "Nl", "Pc"}  # and letters and marks
_WORD_OTHERS = {0x200C, 0x200D, *range(0x24B6, 0x24EA), *range(0x1F130, 0x1F14A), *range(0x1F150, 0x1F16A)} | {
    *range(0x1F170, 0x1F18A)
}


def _is_word(character: str) -> bool:
    """Return whether a character is of a word: Unicode's \\w, as in the `tokenizers` library.

    (Python's has other numbers, and no marks.)
    """
    category = unicodedata.category(character)
    return category[0] in "LM" or category in _WORD_CATEGORIES or ord(character) in _WORD_OTHERS


def _finders(tokens: Sequence[SpecialToken]) -> list[re.Pattern[str]]:
    """Return the patterns that find tokens in texts, one after the other.

    The longest comes first: where two tokens begin at one place, the longer is meant.
    """
    return [
        re.compile("|".join(re.escape(content) for content in sorted(contents, key=len, reverse=True)))
        for late in (False, True)
        if (contents := [token.content for token in tokens if token.late is late])
    ]


def _joined(pieces: Iterable[Any]) -> list[Any]:
    """Join neighbouring texts among pieces."""
    joined: list[Any] = []
    for piece in pieces:
        if isinstance(piece, str) and joined and isinstance(joined[-1], str):
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined


class Tokenizer:
    """Tokenizer of one checkpoint, made by `Tokenizer.from_folder`. It never changes: threads may share it.

    Attributes:
        vocab_size: the largest id of a token, plus one.
    """

    def __init__(
        self,
        encoding: tiktoken.Encoding,
        token_bytes: Mapping[int, bytes],
        special: Sequence[SpecialToken],
        model_vocab_size: int = 0,
    ):
        """Build the tables of special tokens.

        Args:
            encoding: turns plain text into ids.
            token_bytes: the bytes of every id that text can become, and of any other to be decoded.
            special: the special tokens.
            model_vocab_size: the number of rows of the model's embedding, 0 if unknown.
        """
        self._encoding = encoding
        self._special = {token.id: token for token in special}
        self._bytes = dict(token_bytes) | {token.id: token.content.encode() for token in special}
        self._skipped = frozenset(token.id for token in special if token.skip)
        self._finders = _finders(special)
        added = [token for token in special if not _CONTROL.fullmatch(token.content)]
        self._added = _finders(added)
        self._control = frozenset(self._special) - {token.id for token in added}
        self._ids = {token.content: token.id for token in special}
        self.vocab_size: int = max(self._bytes) + 1
        self._id_range = max(self.vocab_size, model_vocab_size)

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """Ids of the special tokens, by content."""
        return MappingProxyType(self._ids)

    @property
    def control_tokens(self) -> frozenset[int]:
        """Ids of the special tokens that are never part of plain text, as those are that a fine-tuner added."""
        return self._control

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """Read `tokenizer.json`, else `vocab.json` and `merges.txt`, of a checkpoint folder.

        With the latter, special tokens come from `added_tokens_decoder` of `tokenizer_config.json`, else from
        `added_tokens.json` and `special_tokens_map.json`, and text is split by o200k_base's pattern. `vocab_size` of
        `config.json`, where there is one, bounds the ids (see `decode_bytes`).

        Raises:
            CheckpointError: a file is missing, broken, or states anything but a byte-level BPE that tiktoken reproduces
                exactly.
        """
        folder = Path(folder)
        files = read_tokenizer_files(folder)
        model_vocab_size = read_vocab_size(folder / "config.json")
        encoding, token_bytes = build_encoding(files)
        tokenizer = cls(encoding, token_bytes, files.special, model_vocab_size)
        if 0 < model_vocab_size < tokenizer.vocab_size:
            ids = tokenizer.vocab_size
            refuse(
                files.path,
                f"its ids go to {ids - 1}, and vocab_size of config.json is only {model_vocab_size}",
                "If tokens were added, save the model after model.resize_token_embeddings(len(tokenizer)); else copy "
                "the tokenizer that belongs to this model here.",
            )
        return tokenizer

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Return the ids of `text`.

        With `special` the special tokens in it are recognised; otherwise all of it is plain text, `<|end|>` too, but
        for tokens that structure no prompt, as those that a fine-tuner added.

        Raises:
            InputError: as in `encode_pieces`.
        """
        return self.encode_pieces(self.split_special(text) if special else [text])

    def split_special(self, text: str) -> list[str | int]:
        """Split a raw prompt at its special tokens: plain text as strings, special tokens as ids, in order.

        White space is left for `encode_pieces` to swallow.

        Raises:
            InputError: the text is no string.
        """
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
        """Return the ids of a sequence of plain texts (str), special tokens (int) and ids taken as they are (tuple).

        Neighbouring texts are one text: tokens form across their boundary, and added tokens that structure no prompt
        are found in it, as transformers does. A special token swallows the white space of neighbouring text as its
        flags say.

        Raises:
            InputError: an id is not a special token, or a text is not valid Unicode or has a run of white space too
                long for the regular expression engine (over half a million).
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
        """Return the text of `ids`; bytes that are not UTF-8 become U+FFFD. Otherwise as `decode_bytes`."""
        return self.decode_bytes(ids, skip_special).decode(errors="replace")

    def decode_bytes(self, ids: Iterable[int], skip_special: bool = False) -> bytes:
        """Return the bytes of `ids`, which may end within a character.

        `skip_special` leaves out the tokens that the tokenizer's file marks as special; other added tokens stay. The
        model's vocabulary is padded: an id that has a row in the embedding but no token is empty.

        Raises:
            InputError: an id is beyond both, negative or not an integer.
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
