"""The tokenizer against recorded ids, against the `tokenizers` library, and against bad input."""

import json
import lzma
import pickle
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from phi4mm_jax.errors import CheckpointError, InputError
from phi4mm_jax.processing.tokenizer import Tokenizer

FIXTURES = Path(__file__).parents[1] / "fixtures"
TINY = FIXTURES / "ms_tiny"
TINY_CASES = json.loads((TINY / "goldens.json").read_text())["tokenizer"]
O200K_CASES = json.loads((FIXTURES / "o200k" / "cases.json").read_text())["cases"]


def tiny_json() -> dict[str, Any]:
    return json.loads((TINY / "tokenizer.json").read_text())


def o200k_json() -> dict[str, Any]:
    return json.loads(lzma.decompress((FIXTURES / "o200k" / "tokenizer.json.xz").read_bytes()))


@pytest.fixture(scope="module")
def tiny() -> Tokenizer:
    return Tokenizer.from_folder(TINY)


@pytest.fixture(scope="module")
def o200k_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("o200k")
    content = lzma.decompress((FIXTURES / "o200k" / "tokenizer.json.xz").read_bytes())
    (folder / "tokenizer.json").write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def o200k(o200k_folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(o200k_folder)


@pytest.fixture(scope="module")
def o200k_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, tokenizers.Tokenizer]:
    """The same file for both, with the gaps between the special tokens filled: `tokenizers` numbers added tokens by
    itself, one after the other, so that the file's ids hold only if they leave no gap."""
    content = o200k_json()
    taken = {token["id"]: token for token in content["added_tokens"]}
    dummy = {"special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
    content["added_tokens"] = [
        taken.get(i, {"id": i, "content": f"<|dummy_{i}|>"} | dummy) for i in range(199998, max(taken) + 1)
    ]
    folder = tmp_path_factory.mktemp("filled")
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return Tokenizer.from_folder(folder), tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def tiny_pair(tiny: Tokenizer) -> tuple[Tokenizer, tokenizers.Tokenizer]:
    return tiny, tokenizers.Tokenizer.from_file(str(TINY / "tokenizer.json"))


def both(folder: Path, content: dict[str, Any]) -> tuple[Tokenizer, tokenizers.Tokenizer]:
    """Ours and theirs, from one `tokenizer.json`."""
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return Tokenizer.from_folder(folder), tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


def theirs(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


WORDS = (
    "the ",
    "Hello",
    " world",
    "don't",
    "WE'LL",
    "x=1",
    "12345",
    "\n\n",
    "\r\n",
    "\t",
    "   ",
    "...",
    "</s>",
    "é",
    "ß",
)
RANGES = (
    (0, 0x80),
    (0x80, 0x250),
    (0x300, 0x600),
    (0x900, 0xE80),
    (0x2000, 0x2100),
    (0x3040, 0xA000),
    (0x1F300, 0x1FA00),
)


def random_texts(seed: int, count: int, special: tuple[str, ...] = ()) -> Iterator[str]:
    """Texts of words, characters of many scripts, white space of every kind and, sprinkled in, `special`."""
    rng = random.Random(seed)
    for _ in range(count):
        parts = []
        for _ in range(rng.randint(1, 30)):
            match rng.randint(0, 6 if special else 4):
                case 0 | 1:
                    parts.append(rng.choice(WORDS))
                case 2 | 3:
                    low, high = rng.choice(RANGES)
                    parts.append("".join(chr(rng.randrange(low, high)) for _ in range(rng.randint(1, 4))))
                case 4:
                    parts.append(
                        "".join(rng.choice(" \n\t\x1c\x85\xa0\u2003\u200b\u3000") for _ in range(rng.randint(1, 3)))
                    )
                case _:
                    parts.append(rng.choice(special))
        yield "".join(parts)


# Recorded ids.


@pytest.mark.parametrize("case", TINY_CASES, ids=range(len(TINY_CASES)))
def test_ids_are_golden(tiny: Tokenizer, case: dict[str, Any]):
    assert tiny.encode(case["text"], special=True) == case["ids"]


@pytest.mark.parametrize("case", O200K_CASES, ids=range(len(O200K_CASES)))
def test_ids_of_o200k_are_golden(o200k: Tokenizer, case: dict[str, Any]):
    assert o200k.encode(case["text"]) == case["ids"]
    assert o200k.decode(case["ids"]) == case["text"]


def test_special_tokens_have_the_ids_of_the_file(tiny: Tokenizer, o200k: Tokenizer):
    assert dict(tiny.special_tokens) == {token["content"]: token["id"] for token in tiny_json()["added_tokens"]}
    assert (tiny.vocab_size, o200k.vocab_size) == (648, 200029)
    assert o200k.special_tokens["<|endoftext10|>"] == 200010
    assert o200k.encode("<|user|>hi<|end|><|assistant|>", special=True) == [200021, 3686, 200020, 200019]


# The `tokenizers` library.


@pytest.mark.parametrize("pair", ["tiny_pair", "o200k_pair"])
def test_agrees_with_tokenizers(pair: str, request: pytest.FixtureRequest):
    ours, library = request.getfixturevalue(pair)
    for text in random_texts(seed=1, count=1500, special=tuple(ours.special_tokens)):
        ids = ours.encode(text, special=True)
        assert ids == theirs(library, text), ascii(text)
        assert ours.decode(ids) == library.decode(ids, skip_special_tokens=False)
        assert ours.decode(ids, skip_special=True) == library.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("pair", ["tiny_pair", "o200k_pair"])
def test_agrees_with_tokenizers_on_every_character(pair: str, request: pytest.FixtureRequest):
    ours, library = request.getfixturevalue(pair)
    characters = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    random.Random(2).shuffle(characters)
    for start in range(0, len(characters), 4096):
        # Each between a letter and a capital, so that its class shows in how the text is split.
        text = "".join(f"a{c}B" for c in characters[start : start + 4096])
        assert ours.encode(text) == theirs(library, text)


def with_flags(**flags: bool) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        for token in content["added_tokens"]:
            token.update(flags)

    return change


def with_overlapping_tokens(content: dict[str, Any]) -> None:
    """Tokens that begin alike, and one that is looked for after the others."""
    flags = {"special": True, "normalized": False, "lstrip": False, "rstrip": True, "single_word": False}
    content["added_tokens"] += [
        {"id": 648, "content": "<|end|>!"} | flags,
        {"id": 649, "content": "<|"} | flags,
        {"id": 650, "content": "the <|user|>"} | flags | {"normalized": True, "lstrip": True},
        {"id": 651, "content": "Hello"} | flags | {"normalized": True, "lstrip": True, "special": False},
    ]


@pytest.mark.parametrize(
    "change",
    [
        with_flags(lstrip=True),
        with_flags(lstrip=True, rstrip=True),
        with_flags(normalized=True),
        with_overlapping_tokens,
    ],
    ids=["lstrip", "lstrip-rstrip", "normalized", "overlapping"],
)
def test_special_token_flags_as_in_tokenizers(tmp_path: Path, change: Callable[[dict[str, Any]], None]):
    content = tiny_json()
    change(content)
    ours, library = both(tmp_path, content)
    special = (*ours.special_tokens, *("<|end|>", "<|user|>") * 8)
    for text in random_texts(seed=3, count=500, special=special):
        ids = ours.encode(text, special=True)
        assert ids == theirs(library, text), ascii(text)
        assert ours.decode(ids, skip_special=True) == library.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("flags", [{}, {"lstrip": True}, {"rstrip": True}, {"normalized": True}, {"special": False}])
def test_single_words_as_in_tokenizers(tmp_path: Path, flags: dict[str, bool]):
    """Beside letters, marks, digits, joiners and connectors it is text; not beside other numbers and signs."""
    content = tiny_json()
    token = {"single_word": True, "normalized": False, "lstrip": False, "rstrip": False, "special": True, **flags}
    content["added_tokens"] += [{"id": 648, "content": "the"} | token, {"id": 649, "content": "the the"} | token]
    ours, library = both(tmp_path, content)
    words = ["a", "\u00e9", "e\u0301", "\u0301", "_", "\u203f", "7", "\u0663", "\u2160", "\u24b6", "\u200d", "\u4e16"]
    others = ["", " ", "\n", "\u00bd", "\u00b2", "\u2460", "\u200b", "-", ".", "\U0001f600", "<|end|>", "the", "the "]
    around = [*words, *others]
    texts = [f"{before}{word}{after}" for word in ("the", "the the") for before in around for after in around]
    for text in texts:
        assert ours.encode(text, special=True) == theirs(library, text), ascii(text)


@pytest.mark.parametrize("regex", [None, r"\p{L}+| ?\p{N}+", r"[^\r\n\p{L}\p{N}]?\p{L}+|\s"])
@pytest.mark.parametrize(("behavior", "invert"), [("Isolated", False), ("Removed", True)])
def test_splits_as_tokenizers(tmp_path: Path, regex: str | None, behavior: str, invert: bool):
    """Also with patterns that leave text unmatched: "Isolated" keeps it, "Removed" drops it."""
    content = tiny_json()
    split = content["pre_tokenizer"]["pretokenizers"][0]
    split |= {"behavior": behavior, "invert": invert}
    if regex:
        split["pattern"] = {"Regex": regex}
    ours, library = both(tmp_path, content)
    for text in random_texts(seed=4, count=300):
        assert ours.encode(text) == theirs(library, text), ascii(text)


@pytest.mark.torch
def test_a_folder_that_transformers_saved(tmp_path: Path):
    """AutoTokenizer takes the published class, GPT-2's, and saves another split into words: what it says is done."""
    from transformers import AutoTokenizer

    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, tmp_path)
    library = AutoTokenizer.from_pretrained(tmp_path)
    library.add_tokens(["<loc_1>", "the loc"])
    library.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "tokenizer.json").read_text())["pre_tokenizer"]["type"] == "ByteLevel"
    ours = Tokenizer.from_folder(tmp_path / "saved")
    special = (*ours.special_tokens, *("<loc_1>", "the loc") * 8)
    for text in random_texts(seed=11, count=400, special=special):
        assert ours.encode(text, special=True) == library(text)["input_ids"], ascii(text)
    for text in random_texts(seed=12, count=200, special=("<loc_1>", "the loc")):
        assert ours.encode(text) == library(text)["input_ids"], ascii(text)


def tiny_beside(folder: Path, change: Callable[[dict[str, Any]], None], name: str = "tokenizer_config.json") -> Path:
    """A folder with the small tokenizer, whose settings, or a file of another name, are changed."""
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / file, folder)
    settings = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    change(settings)
    (folder / name).write_text(json.dumps(settings))
    return folder


@pytest.mark.torch
@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "normalized", "special"])
def test_flags_of_tokenizer_config_are_those_of_transformers(tmp_path: Path, flag: str):
    from transformers import PreTrainedTokenizerFast

    def change(settings: dict[str, Any]) -> None:
        for token in settings["added_tokens_decoder"].values():
            if token["content"] in ("<|end|>", "<|user|>"):
                token[flag] = not token[flag]

    ours = Tokenizer.from_folder(tiny_beside(tmp_path, change))
    library = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    special = (*ours.special_tokens, *("<|end|>", "<|user|>") * 8)
    for text in random_texts(seed=13, count=200, special=special):
        ids = ours.encode(text, special=True)
        assert ids == library(text)["input_ids"], ascii(text)
        assert ours.decode(ids, skip_special=True) == library.decode(ids, skip_special_tokens=True)


def unlisted(settings: dict[str, Any]) -> None:
    token = settings["added_tokens_decoder"]["639"]
    settings["added_tokens_decoder"]["648"] = token | {"content": "<new>"}


@pytest.mark.torch
@pytest.mark.parametrize(
    "change",
    [
        unlisted,
        lambda settings: settings.update(pad_token="<new>"),
        lambda settings: settings.update(unk_token={"content": "<new>", "__type": "AddedToken"}),
        lambda settings: settings.update(extra_special_tokens=["<|end|>", "<new>"]),
        lambda settings: settings.update(extra_special_tokens={"image_token": "<new>"}),
        lambda settings: settings.update(additional_special_tokens=["<new>"]),
    ],
)
def test_tokens_that_transformers_would_add_are_refused(tmp_path: Path, change: Callable[[dict[str, Any]], None]):
    from transformers import PreTrainedTokenizerFast

    assert 648 in PreTrainedTokenizerFast.from_pretrained(tiny_beside(tmp_path, change))("<new>")["input_ids"]
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: names the token '<new>'.*save_pretrained"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("name", "content"), [("special_tokens_map.json", {"pad_token": "<new>"}), ("added_tokens.json", {"<new>": 648})]
)
def test_older_files_count_where_the_settings_have_no_tokens(tmp_path: Path, tiny: Tokenizer, name: str, content: Any):
    from transformers import PreTrainedTokenizerFast

    tiny_beside(tmp_path, lambda settings: settings.update(content), name)
    assert Tokenizer.from_folder(tmp_path).encode("<new>") == tiny.encode("<new>")
    tiny_beside(tmp_path, lambda settings: settings.pop("added_tokens_decoder"))
    assert 648 in PreTrainedTokenizerFast.from_pretrained(tmp_path)("<new>")["input_ids"]
    with pytest.raises(CheckpointError, match=f"{name}: names the token '<new>'"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda settings: settings.update(split_special_tokens=True), "split_special_tokens is set"),
        (lambda settings: settings.update(add_prefix_space=True), "tokenizer_config.json: add_prefix_space is set"),
        (
            lambda settings: settings["added_tokens_decoder"].update({"640": settings["added_tokens_decoder"]["639"]}),
            "'<|end|>' as 640, and tokenizer.json as 639",
        ),
    ],
)
def test_settings_against_tokenizer_json_are_refused(tmp_path: Path, change: Callable[[Any], None], message: str):
    with pytest.raises(CheckpointError, match=re.escape(message)):
        Tokenizer.from_folder(tiny_beside(tmp_path, change))


@pytest.mark.parametrize("key", ["split_special_tokens", "add_prefix_space"])
def test_settings_beside_vocab_and_merges_are_refused(tmp_path: Path, key: str):
    (tmp_path / "vocab.json").write_text(json.dumps(tiny_json()["model"]["vocab"]))
    (tmp_path / "merges.txt").write_text("")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({key: True}))
    with pytest.raises(CheckpointError, match=rf"tokenizer_config\.json: {key} is set"):
        Tokenizer.from_folder(tmp_path)


def random_bpe(rng: random.Random) -> dict[str, Any]:
    """A BPE over a few letters with random merges, of which many can never be used."""
    content = tiny_json()
    vocab = {token: i for token, i in content["model"]["vocab"].items() if len(token) == 1}
    letters = "abc"[: rng.randint(1, 3)]
    tokens, merges = list(letters), []
    for i in range(rng.randint(1, 25)):
        left, right = rng.choice(tokens), rng.choice(tokens)
        if left + right not in vocab:
            vocab[left + right] = 1000 + 3 * i
            tokens.append(left + right)
            merges.append([left, right])
    match rng.randint(0, 2):
        case 1:  # every way to make a token
            splits = [[token[:i], token[i:]] for token in tokens for i in range(1, len(token))]
            merges = [split for split in splits if split[0] in vocab and split[1] in vocab]
        case 2:  # some tokens of which nothing is made as it was meant
            merges = [merge for merge in merges if rng.random() < 0.8]
    merges.sort(key=lambda merge: vocab["".join(merge)])
    content["model"] |= {"vocab": vocab, "merges": merges}
    content["added_tokens"] = []
    return content


def test_accepted_merges_give_the_ids_of_tokenizers(tmp_path: Path):
    """The proof of the pudding for the check of the merges: what is accepted gives the ids of the merge list."""
    rng = random.Random(5)
    accepted = 0
    for _ in range(300):
        content = random_bpe(rng)
        try:
            ours, library = both(tmp_path, content)
        except CheckpointError:
            continue
        accepted += 1
        letters = [token for token in content["model"]["vocab"] if token in ("a", "b", "c")]
        texts = ["".join(rng.choices(letters, k=rng.choice([4, 9, 20, 150]))) for _ in range(15)]
        for text in [*texts, *(token for token in content["model"]["vocab"] if len(token) > 1)]:
            assert ours.encode(text) == theirs(library, text), (text, content["model"]["merges"])
    assert accepted > 250


def test_token_that_no_merge_forms_is_decoded_only(tmp_path: Path):
    content = tiny_json()
    content["model"]["vocab"]["<|dummy_9|>"] = 700  # in the vocabulary alone, as the release has some
    content["model"]["vocab"] |= {"hello": 701, "ello": 702}
    content["model"]["merges"] += [["h", "ello"]]  # comes to nothing: (h, e) is earlier, and nothing makes "ello"
    ours, library = both(tmp_path, content)
    for text in ("hello", "ello", "<|dummy_9|>", "say hello"):
        assert ours.encode(text, special=True) == theirs(library, text)
        assert max(ours.encode(text)) < 633
    assert ours.decode([700, 701, 702]) == "<|dummy_9|>helloello"


def test_special_token_may_be_in_the_vocabulary_too(tmp_path: Path, tiny: Tokenizer):
    content = tiny_json()
    content["model"]["vocab"] |= {token["content"]: token["id"] for token in content["added_tokens"]}
    ours, library = both(tmp_path, content)
    for text in random_texts(seed=6, count=200, special=tuple(tiny.special_tokens)):
        assert ours.encode(text, special=True) == theirs(library, text) == tiny.encode(text, special=True)
        assert ours.encode(text) == tiny.encode(text)


# Layouts.


def spelled(content: dict[str, Any]) -> list[str]:
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]


def write_vocab_and_merges(folder: Path, content: dict[str, Any]) -> None:
    (folder / "vocab.json").write_text(json.dumps(content["model"]["vocab"]))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *spelled(content)]) + "\n")


def write_added_tokens_decoder(folder: Path, content: dict[str, Any]) -> None:
    decoder = {str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in content["added_tokens"]}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))


def test_merges_are_read_in_both_spellings(tmp_path: Path, tiny: Tokenizer):
    content = tiny_json()
    assert isinstance(content["model"]["merges"][0], list)
    content["model"]["merges"] = spelled(content)
    ours, _ = both(tmp_path, content)
    for text in random_texts(seed=7, count=200):
        assert ours.encode(text) == tiny.encode(text)


@pytest.mark.parametrize("load", [tiny_json, o200k_json])
def test_vocab_and_merges_are_read_as_tokenizer_json(tmp_path: Path, load: Callable[[], dict[str, Any]]):
    content = load()
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    expected = Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    write_vocab_and_merges(tmp_path, content)
    write_added_tokens_decoder(tmp_path, content)
    ours = Tokenizer.from_folder(tmp_path)
    assert ours.special_tokens == expected.special_tokens
    assert ours.vocab_size == expected.vocab_size
    special = tuple(expected.special_tokens)
    for text in [
        *(case["text"] for case in TINY_CASES + O200K_CASES),
        *random_texts(seed=8, count=300, special=special),
    ]:
        assert ours.encode(text, special=True) == expected.encode(text, special=True), ascii(text)
        assert ours.encode(text) == expected.encode(text), ascii(text)


def test_older_files_of_special_tokens_are_read(tmp_path: Path, tiny: Tokenizer):
    content = tiny_json()
    added = content["added_tokens"]
    content["model"]["vocab"]["<|endoftext|>"] = 633
    write_vocab_and_merges(tmp_path, content)
    ids = {token["content"]: token["id"] for token in added if token["content"] != "<|endoftext|>"}
    (tmp_path / "added_tokens.json").write_text(json.dumps(ids))
    stripped = [{k: v for k, v in token.items() if k not in ("id", "special")} for token in added if token["rstrip"]]
    assert len(stripped) == 4
    names = {"eos_token": "<|endoftext|>", "pad_token": "<|tool|>", "additional_special_tokens": stripped}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(names))
    ours = Tokenizer.from_folder(tmp_path)
    assert ours.special_tokens == tiny.special_tokens
    for text in random_texts(seed=9, count=200, special=tuple(tiny.special_tokens)):
        assert ours.encode(text, special=True) == tiny.encode(text, special=True)


def test_merges_may_have_windows_line_ends(tmp_path: Path, tiny: Tokenizer):
    content = tiny_json()
    write_vocab_and_merges(tmp_path, content)
    (tmp_path / "merges.txt").write_bytes("\r\n".join(["#version: 0.2", *spelled(content), ""]).encode())
    ours = Tokenizer.from_folder(str(tmp_path))
    assert ours.encode("the weather of the day") == tiny.encode("the weather of the day")
    assert not ours.special_tokens


# Round trips, pieces, decoding.


@pytest.mark.parametrize("name", ["tiny", "o200k"])
def test_decoding_gives_the_text_back(name: str, request: pytest.FixtureRequest):
    tokenizer = request.getfixturevalue(name)
    assert tokenizer.encode("") == tokenizer.encode("", special=True) == []
    assert tokenizer.decode([]) == ""
    special = tuple(tokenizer.special_tokens)
    for text in random_texts(seed=10, count=1000, special=special):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not tokenizer.control_tokens.intersection(ids)
        assert b"".join(tokenizer.decode_bytes([i]) for i in ids) == text.encode()


def test_special_tokens_are_text_unless_asked_for(tiny: Tokenizer):
    end = tiny.special_tokens["<|end|>"]
    assert end not in tiny.encode("a<|end|> b")
    assert tiny.decode(tiny.encode("a<|end|> b")) == "a<|end|> b"
    assert tiny.encode("a<|end|> b", special=True) == [*tiny.encode("a"), end, *tiny.encode("b")]


def test_pieces_are_encoded_as_one_text(tiny: Tokenizer):
    user, tool, end = (tiny.special_tokens[f"<|{name}|>"] for name in ("user", "tool", "end"))
    the, other = tiny.encode(" the"), tiny.encode(" ") + tiny.encode("the")
    assert the != other  # tokens form across the space
    assert tiny.encode_pieces([" ", "t", "", "he"]) == the
    assert tiny.encode_pieces([]) == tiny.encode_pieces(["", ""]) == []
    # rstrip swallows white space after the token, over several pieces, and only at the start.
    assert tiny.encode_pieces([user, " \n", "\u3000", " the "]) == [user, *tiny.encode("the ")]
    assert tiny.encode_pieces([user, "\x1c the"]) == [user, *tiny.encode("\x1c the")]
    assert tiny.encode_pieces([user, "  ", end]) == [user, end]
    # A token without flags leaves it.
    assert tiny.encode_pieces([" ", tool, " ", tool, " the"]) == [
        *tiny.encode(" "),
        tool,
        *tiny.encode(" "),
        tool,
        *the,
    ]


def test_split_special_loses_no_text(tiny: Tokenizer):
    user, end = tiny.special_tokens["<|user|>"], tiny.special_tokens["<|end|>"]
    assert tiny.split_special("") == []
    assert tiny.split_special("a <|user|> <|user|><|end|>") == ["a ", user, " ", user, end]
    for text in random_texts(seed=11, count=300, special=tuple(tiny.special_tokens)):
        pieces = tiny.split_special(text)
        names = {i: content for content, i in tiny.special_tokens.items()}
        assert "".join(names[p] if isinstance(p, int) else p for p in pieces) == text
        assert tiny.encode_pieces(pieces) == tiny.encode(text, special=True)


@pytest.mark.parametrize("piece", [0, 632, 648, -1, True, 1.5, None, b"a", ["a"]])
def test_a_piece_that_is_no_special_token_is_refused(tiny: Tokenizer, piece: Any):
    with pytest.raises(InputError, match=r"special"):
        tiny.encode_pieces(["a", piece])


@pytest.mark.parametrize("text", [None, b"a", 5, ["a"]])
@pytest.mark.parametrize("special", [True, False])
def test_a_text_that_is_no_string_is_refused(tiny: Tokenizer, text: Any, special: bool):
    with pytest.raises(InputError, match=r"pass|special"):
        tiny.encode(text, special=special)


@pytest.mark.parametrize("special", [True, False])
def test_a_lone_surrogate_is_named_by_its_place(tiny: Tokenizer, special: bool):
    with pytest.raises(InputError, match=r"lone surrogate U\+D83D at character 2.*utf-16"):
        tiny.encode("ab\ud83d", special=special)
    with pytest.raises(InputError, match=r"U\+DE00 at character 0"):
        tiny.encode("\ude00\ud83d", special=special)


def test_characters_cut_by_tokens_are_decoded_as_bytes(tiny: Tokenizer):
    face = tiny.encode("😀")
    assert len(face) > 1
    assert tiny.decode_bytes(face) == "😀".encode()
    assert tiny.decode_bytes(face[:-1]) == "😀".encode()[:-1]
    assert tiny.decode(face[:-1]).endswith("\ufffd")
    ids = [tiny.special_tokens["<|user|>"], *tiny.encode("hi"), tiny.special_tokens["<|end|>"]]
    assert tiny.decode(ids) == "<|user|>hi<|end|>"
    assert tiny.decode(ids, skip_special=True) == "hi"
    assert tiny.decode(np.array(ids, np.int32), skip_special=True) == "hi"
    assert tiny.decode(i for i in ids) == "<|user|>hi<|end|>"


def test_skip_special_goes_by_the_file(tmp_path: Path):
    content = tiny_json()
    for token in content["added_tokens"]:
        token["special"] = not token["content"].startswith("<|tool")
    ours, library = both(tmp_path, content)
    ids = ours.encode("<|user|>a<|tool_call|>[]<|/tool_call|><|end|>", special=True)
    assert ours.decode(ids, skip_special=True) == "a<|tool_call|>[]" == library.decode(ids, skip_special_tokens=True)


def test_padded_vocabulary_decodes_to_nothing(tiny: Tokenizer, o200k_folder: Path, o200k: Tokenizer):
    """The embedding has more rows than there are tokens: 768 (of 648) in the tiny checkpoint."""
    hi = tiny.encode("hi")
    assert tiny.decode([648, *hi, 767]) == "hi"
    with pytest.raises(InputError, match=r"768.*0 to 767"):
        tiny.decode([768])
    # Without a config.json the tokens alone count; gaps between them are empty too.
    assert o200k.decode([199998, 200000, 200028]) == "<|tag|>"
    with pytest.raises(InputError, match=r"200029.*0 to 200028"):
        o200k.decode([200029])


@pytest.mark.parametrize("bad", [-1, 2**40, 1.0, "a", None])
def test_an_unknown_id_is_refused(tiny: Tokenizer, bad: Any):
    with pytest.raises(InputError, match=str(bad)):
        tiny.decode([1, bad])


# Size and speed.


@pytest.mark.parametrize("name", ["tiny_pair", "o200k_pair"])
@pytest.mark.parametrize("run", ["A", " ", "a", "\n", "1", "/", "é", "가", "\u0301", " \n", "<|", "aA"])
def test_long_runs_are_encoded_in_linear_time(name: str, run: str, request: pytest.FixtureRequest):
    ours, library = request.getfixturevalue(name)
    for end in ("", "x"):
        text = run * (100_000 // len(run)) + end
        start = time.process_time()
        ids = ours.encode(text, special=True)
        assert time.process_time() - start < 2
        assert ids == theirs(library, text)


def test_white_space_beyond_the_regular_expression_engine_is_encoded(tiny: Tokenizer):
    assert tiny.decode(tiny.encode(" " * 500_000)) == " " * 500_000
    with pytest.raises(InputError, match=r"2000000 characters.*white space.*shorten"):
        tiny.encode(" " * 2_000_000)


def test_the_release_loads_and_encodes_quickly(o200k_folder: Path):
    """About 1.2 s and 0.15 s; the bounds leave room for a slow machine, not for another complexity."""
    start = time.process_time()
    tokenizer = Tokenizer.from_folder(o200k_folder)
    loaded = time.process_time()
    tokenizer.encode("".join(case["text"] for case in O200K_CASES) * 2500, special=True)
    assert loaded - start < 6
    assert time.process_time() - loaded < 2


def test_a_tokenizer_pickles(tiny: Tokenizer):
    copy = pickle.loads(pickle.dumps(tiny))
    text = "<|user|> hello<|end|>"
    assert copy.encode(text, special=True) == tiny.encode(text, special=True)
    assert copy.special_tokens == tiny.special_tokens


# Bad folders.


def test_missing_files_are_named(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"tokenizer\.json.*vocab\.json.*merges\.txt.*none of them"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "merges.txt").write_text("a b")
    with pytest.raises(CheckpointError, match=r"found merges\.txt\. Copy"):
        Tokenizer.from_folder(tmp_path)
    with pytest.raises(CheckpointError, match="Looked for"):
        Tokenizer.from_folder(tmp_path / "missing")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff{}", b"[" * 100_000, b"9" * 5000])
def test_broken_json_is_named(tmp_path: Path, content: bytes):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: .*Download the file again"):
        Tokenizer.from_folder(tmp_path)


def put(*path: Any) -> Callable[[dict[str, Any]], None]:
    """Puts the last of `path` where the others lead."""
    *keys, key, value = path

    def change(content: Any) -> None:
        for k in keys:
            content = content[k]
        content[key] = value

    return change


def swap_merges(content: dict[str, Any]) -> None:
    merges = content["model"]["merges"]
    merges[3], merges[300] = merges[300], merges[3]


def merge_only_of_a_later_part(content: dict[str, Any]) -> None:
    """(a, bc) makes the token before bc is there, and nothing else makes it."""
    vocab = {token: i for token, i in content["model"]["vocab"].items() if len(token) == 1}
    content["model"] |= {"vocab": vocab | {"abc": 300, "bc": 301}, "merges": [["a", "bc"], ["b", "c"]]}


SPLIT = ("pre_tokenizer", "pretokenizers", 0)
ADDED = ("added_tokens", 3)
VOCAB, MERGES = ("model", "vocab"), ("model", "merges")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("model", None), "not a BPE"),
        (put("model", "type", "Unigram"), "not a BPE"),
        (put("model", "dropout", 0.1), "dropout 0.1"),
        (put("model", "unk_token", "<unk>"), "unk_token"),
        (put("model", "end_of_word_suffix", "</w>"), "end_of_word_suffix"),
        (put("model", "continuing_subword_prefix", "##"), "continuing_subword_prefix"),
        (put("normalizer", {"type": "NFC"}), "normalized"),
        (put("post_processor", {"type": "BertProcessing"}), "post_processor"),
        (put("post_processor", {"type": "TemplateProcessing", "single": [{"SpecialToken": {}}]}), "post_processor"),
        (put("pre_tokenizer", None), "pre_tokenizer"),
        (put("pre_tokenizer", {"type": "ByteLevel", "use_regex": True}), "pre_tokenizer"),
        (put(*SPLIT, "behavior", "Removed"), "pre_tokenizer"),
        (put(*SPLIT, "behavior", "MergedWithNext"), "pre_tokenizer"),
        (put(*SPLIT, "pattern", {"String": " "}), "pre_tokenizer"),
        (put(*SPLIT, "pattern", {"Regex": "(a"}), r"cannot compile the pattern '.*\(a"),
        (put("pre_tokenizer", "pretokenizers", 1, "add_prefix_space", True), "pre_tokenizer"),
        (put("pre_tokenizer", "pretokenizers", 1, "use_regex", True), "pre_tokenizer"),
        (put(*VOCAB, ["a"]), "model.vocab"),
        (put(*VOCAB, {}), "no tokens"),
        (put(*VOCAB, {"a": 0}), "1 of the 256 single bytes"),
        (put(*VOCAB, "the", -1), "not an integer"),
        (put(*VOCAB, "the", 1.5), "not an integer"),
        (put(*VOCAB, "the", "7"), "not an integer"),
        (put(*VOCAB, "the", 2**31), "not an integer"),
        (put(*VOCAB, "xyz", 5), "two tokens have the id 5"),
        (put(*VOCAB, "xyz", 640), "two tokens have the id 640"),
        (put(*VOCAB, "<|user|>", 700), r"'<\|user\|>' has id 640 and 700"),
        (put(*VOCAB, "▁the", 700), r"'▁the' is not spelled in the byte-level alphabet"),
        (put(*VOCAB, "a b", 700), r"'a b' is not spelled"),
        (put(*VOCAB, "\ud800", 700), "is not spelled"),
        (put(*MERGES, None), "model.merges"),
        (put(*MERGES, 0, ["a"]), "not a pair"),
        (put(*MERGES, 0, ["a", 1]), "not a pair"),
        (put(*MERGES, 0, ["", "a"]), "not a pair"),
        (put(*MERGES, 0, "a b"), "not a pair"),
        (put(*MERGES, ["a b c"]), "not a pair"),
        (put(*MERGES, ["a"]), "not a pair"),
        (put(*MERGES, 7, ["Q", "Q"]), r"merge 7 \('Q', 'Q'\) joins or makes"),
        (put(*MERGES, 7, ["QQQ", "Q"]), r"merge 7 \('QQQ', 'Q'\) joins or makes"),
        (swap_merges, r"merge 4 .* makes token 260 out of turn.*order of the ids"),
        (merge_only_of_a_later_part, r"merge 0 \('a', 'bc'\) makes token 300 out of turn"),
        (put("added_tokens", None), "added_tokens"),
        (put(*ADDED, "x"), "needs a content and an id"),
        (put(*ADDED, "id", None), "needs a content and an id"),
        (put(*ADDED, "id", -1), "needs a content and an id"),
        (put(*ADDED, "content", ""), "needs a content and an id"),
        (put(*ADDED, "content", "\ud800"), "not valid Unicode"),
        (put(*ADDED, "id", 640), "two tokens have the id 640"),
        (put(*ADDED, "lstrip", "yes"), "neither true nor false"),
        (put(*ADDED, "single_word", "yes"), "neither true nor false"),
    ],
)
def test_bad_tokenizer_json_is_named_with_its_remedy(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
):
    content = tiny_json()
    change(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=message) as error:
        Tokenizer.from_folder(tmp_path)
    assert str(tmp_path / "tokenizer.json") in str(error.value)  # the input
    assert str(error.value).endswith(".")  # the remedy, a sentence of its own


def test_unformed_tokens_with_ignore_merges_are_refused(tmp_path: Path):
    content = tiny_json()
    content["model"]["ignore_merges"] = True
    ours, library = both(tmp_path, content)
    assert ours.encode("the weather") == theirs(library, "the weather")
    content["model"]["vocab"]["hello"] = 700
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="ignore_merges"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    "processor",
    [
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
        {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}], "pair": []},
        {"type": "Sequence", "processors": [{"type": "ByteLevel"}]},
    ],
)
def test_post_processors_that_add_nothing(tmp_path: Path, tiny: Tokenizer, processor: dict[str, Any]):
    (tmp_path / "tokenizer.json").write_text(json.dumps(tiny_json() | {"post_processor": processor}))
    assert Tokenizer.from_folder(tmp_path).encode("the weather") == tiny.encode("the weather")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.json", "[]", r"vocab\.json: holds a list, expected an object"),
        ("merges.txt", "a b c", r"merges\.txt.*not a pair"),
        ("merges.txt", "q q", r"merges\.txt.*merge 0 \('q', 'q'\)"),
        ("tokenizer_config.json", "{", r"tokenizer_config\.json.*JSON"),
        ("tokenizer_config.json", '{"added_tokens_decoder": []}', "not a table of tokens by id"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "a"}}}', "not a table of tokens by id"),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"' + "9" * 5000 + '": {}}}',
            "not a table of tokens by id",
        ),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"700": {}}}', "needs a content and an id"),
        ("added_tokens.json", '{"<|new|>": "5"}', "needs a content and an id"),
        ("special_tokens_map.json", '{"eos_token": "<|new|>"}', "needs a content and an id"),
        ("special_tokens_map.json", '{"eos_token": 5}', "5 is not a token"),
        ("config.json", '{"vocab_size": "many"}', r"config\.json.*'many'"),
        (
            "config.json",
            '{"vocab_size": 600}',
            "vocab_size of config.json is only 600.*resize_token_embeddings",
        ),
    ],
)
def test_a_bad_file_beside_vocab_and_merges_is_named(tmp_path: Path, name: str, content: str, message: str):
    write_vocab_and_merges(tmp_path, tiny_json())
    (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.from_folder(tmp_path)


ADDED = ["<loc_1>", "<loc_12>", "[cell]", "naïve"]


@pytest.mark.torch
@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize(
    "text", ["a <loc_1> b", "<loc_12><loc_1>", "x[cell]y <|end|> z", " naïve naïve", "box <|dummy_0|> here", "none"]
)
def test_added_tokens_are_vocabulary_as_in_transformers(tmp_path: Path, text: str, special: bool):
    """In plain text, where tokens that structure a prompt stay text; the folder is as transformers 5 saves it."""
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_file=str(TINY / "tokenizer.json"))
    theirs.add_tokens(ADDED, special_tokens=special)
    theirs.save_pretrained(tmp_path)
    ours = Tokenizer.from_folder(tmp_path)
    expected = theirs(text, split_special_tokens=False)["input_ids"]
    assert ours.encode(text, special=True) == expected
    if "<|end|>" not in text:
        assert ours.encode(text) == expected
    else:
        end = ours.special_tokens["<|end|>"]
        assert end in expected
        assert end not in ours.encode(text)
        assert ours.decode(ours.encode(text)) == text


def test_ids_are_taken_as_they_are_between_texts(tiny: Tokenizer):
    """Neither merged with the texts beside them nor read again."""
    call = tiny.special_tokens["<|tool_call|>"]
    drawn = (*tiny.encode("a"), *tiny.encode("b"), call)  # one token each, which "ab" need not be
    assert tiny.encode_pieces(["x ", drawn, " y"]) == [*tiny.encode("x "), *drawn, *tiny.encode(" y")]
