"""tiktoken's encoding from a list of merges.

The files state a BPE as a list of pairs to merge, first pair first; tiktoken merges whatever neighbours make up a
token, lowest id first. The two agree when the merges stand in the order of the ids of what they make, and when tiktoken
knows exactly those tokens that the merges can form. `build_encoding` checks the first and arranges the second, so the
ids are those of the `tokenizers` library, or the folder is refused.
"""

import itertools
import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
import tiktoken

from phi4mm_jax.processing.tokenizer_files import MAX_ID, TokenizerFiles, refuse, refuse_kind


def build_encoding(files: TokenizerFiles) -> tuple[tiktoken.Encoding, dict[int, bytes]]:
    """Return the encoding of plain text, and the bytes of each token by its id, but for special ones.

    Raises:
        CheckpointError: tiktoken does not reproduce the files' BPE exactly.
    """
    contents = {token.content for token in files.special}
    names = [name for name in files.vocab if name not in contents]
    numbers = [files.vocab[name] for name in names]
    if set(map(type, numbers)) != {int} or min(numbers) < 0 or max(numbers) >= MAX_ID:
        refuse(files.path, f"a token's id is not an integer from 0 to {MAX_ID - 1}, or there are no tokens")
    ids = np.array(numbers)
    for token in files.special:
        if files.vocab.get(token.content, token.id) != token.id:
            refuse(files.path, f"special token {token.content!r} has id {token.id} and {files.vocab[token.content]}")
    every, count = np.unique([*ids, *(token.id for token in files.special)], return_counts=True)
    if count.max() > 1:
        refuse(files.path, f"two tokens have the id {every[count > 1][0]}")

    spelled = _token_bytes(files.path, names)
    length = np.zeros(ids.max() + 1, np.int64)
    length[ids] = [len(token) for token in spelled]
    if np.count_nonzero(length == 1) != 256:
        refuse_kind(files.path, f"{np.count_nonzero(length == 1)} of the 256 single bytes are tokens")
    left, right, whole = _merge_ids(files, dict(zip(names, numbers, strict=True)))
    # A merge of a part that is formed later than the whole (bytes are there from the start) comes too late to be used:
    # by then the whole has been formed by another merge. If there is no other, ids and time do not go together.
    useless = (left > whole) & (length[left] > 1) | (right > whole) & (length[right] > 1)
    formed = _formed(left[~useless], right[~useless], whole[~useless], length)
    only = useless & formed[left] & formed[right] & ~formed[whole]
    if only.any():
        _out_of_turn(files, whole, int(np.argmax(only)))
    if files.ignore_merges and np.count_nonzero(formed) < len(ids):
        refuse_kind(files.path, "it has tokens that no merge forms, and ignore_merges")

    token_bytes = dict(zip(numbers, spelled, strict=True))
    ranks = {token: id_ for id_, token in token_bytes.items() if formed[id_]}
    try:
        encoding = tiktoken.Encoding(files.path.name, pat_str=files.pattern, mergeable_ranks=ranks, special_tokens={})
    except ValueError as error:
        refuse_kind(files.path, f"tiktoken cannot compile the pattern {files.pattern!r} ({error})")
    return encoding, token_bytes


def _token_bytes(path: Path, names: Sequence[str]) -> list[bytes]:
    """Return the bytes of tokens spelled in the byte-level alphabet.

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
        refuse_kind(path, f"token {name!r} is not spelled in the byte-level alphabet")
    blob = values.astype(np.uint8).tobytes()
    return [blob[start:end] for start, end in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True)]


def _merge_ids(files: TokenizerFiles, vocab: Mapping[str, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the ids of what each merge joins, (M,) left and (M,) right, and of what it makes, (M,)."""
    spelled = files.left, files.right, map(operator.add, files.left, files.right)
    left, right, whole = (np.fromiter(map(vocab.get, names, itertools.repeat(-1)), np.int64) for names in spelled)
    unknown = (left < 0) | (right < 0) | (whole < 0)
    if unknown.any():
        at = int(np.argmax(unknown))
        refuse(files.path, f"{files.merge(at)} joins or makes a token that the vocabulary does not have")
    if (whole[1:] < whole[:-1]).any():
        _out_of_turn(files, whole, int(np.argmax(whole[1:] < whole[:-1])) + 1)
    return left, right, whole


def _out_of_turn(files: TokenizerFiles, whole: np.ndarray, at: int) -> NoReturn:
    cause = f"{files.merge(at)} makes token {whole[at]} out of turn"
    refuse_kind(files.path, f"{cause}; tiktoken needs the merges in the order of the ids of what they make")


def _formed(left: np.ndarray, right: np.ndarray, whole: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Mark the tokens that the merges form from their own bytes, (V,) bool, given the (V,) number of bytes of each.

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
        """Mark merges that nothing across the boundary of their parts disturbs.

        Goes back in time from the final neighbours, undoing whichever was formed last, and looks at each pair facing
        each other across the boundary: would a merge have taken it before its own sides did? Ties go to the left.
        """
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
