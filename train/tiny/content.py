"""Content that the small model reads, hears and is asked: words, numbers, pages of cells, and questions about them.

A page is rows of cells of one character each, four by four cells to a crop of the tower, so that a cell becomes one
token. Text that stands for media has the page and the clip as the decoder shall see them, once the encoders show it
their letters: `page_as_text`, `clip_as_text`.
"""

import zlib
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np

Split = Literal["train", "held"]
Stage = Literal["text", "more"]

SIDE = 4  # cells of a crop
BLANK, BAR, ROW_END, GLOBAL, PAUSE = " ", "=", "\n", "|", "_"
LETTERS, DIGITS = "abcdefghijklmnopqrstuvwxyz", "0123456789"
PAGE, CLIP = "#", "~"  # without its mark nothing is read or heard: the adapters learn to stand for the marks
UNREAD = "?"
READ, HEAR, FIND = "read", "hear", "find"

_UNITS = str.split("zero one two three four five six seven eight nine ten eleven twelve")
_TENS = str.split("twenty thirty forty fifty sixty seventy eighty ninety")
NUMBER_WORDS = [*_UNITS, *_TENS]
THINGS = str.split("""
apple arm baker bank bell bird boat book bread brick bus cake candle cat chair clock cloud coat corn cow cup
desk dog door drum duck eagle engine farm fish flag flower fork fox garden glass goat grape hammer hand hat hill honey
horse house ice island jacket jam jewel judge key king kite knife lamp leaf lemon lion map market milk mirror moon nail
needle nest night ocean onion orange owl paper pear pencil piano queen quilt rabbit rain river rocket rope salt ship
silver snow spoon table tiger tower train tree uncle valley vase violin wagon water window yellow yard zebra""")
_ONSETS = str.split("b d f g h j k l m n p r s t v w z br st tr")
_VOWELS, _CODAS = list("aeiou"), ["", "", "n", "r", "l", "s", "x"]
_SHARES = {  # of the text stages: the second one learns more of what the first one is slow to learn
    "text": {"task": 0.13, "hear": 0.15, "read": 0.25, "find": 0.22, "asked": 0.25},
    "more": {"task": 0.1, "hear": 0.45, "read": 0.3, "find": 0.05, "asked": 0.1},
}
_LOST = {"text": 1, "more": 4}  # of 5 and 8 letters that are misheard
_MAX_LETTERS = 24  # of a page that is read whole


class Page(NamedTuple):
    """Rows of cells, and what is written on it, row by row."""

    rows: tuple[str, ...]
    text: str
    entries: tuple[str, ...] = ()  # names with their values, of charts and cards


def is_of(text: str, split: Split) -> bool:
    """Return whether content belongs to a split, by a hash of itself: none is in both."""
    return (zlib.crc32(text.encode()) % 8 == 0) == (split == "held")


def draw_until(rng: np.random.Generator, split: Split, draw: Callable[[np.random.Generator], str]) -> str:
    while not is_of(text := draw(rng), split):
        pass
    return text


def page(rng: np.random.Generator, split: Split, kind: Literal["lines", "cards", "charts"]) -> Page:
    """Draw a page whose whole text is of its split."""
    draw = {"lines": _lines, "cards": _cards, "charts": _charts}[kind]
    while not is_of((drawn := draw(rng, split)).text, split):
        pass
    return drawn


def made_up_word(rng: np.random.Generator) -> str:
    return "".join(
        str(rng.choice(_ONSETS)) + str(rng.choice(_VOWELS)) + str(rng.choice(_CODAS)) for _ in range(rng.integers(1, 4))
    )


def number(rng: np.random.Generator) -> str:
    return "".join(rng.choice(list(DIGITS), rng.integers(1, 6)))


def unit(rng: np.random.Generator, split: Split, max_length: int) -> str:
    """Draw a word or a number of at most `max_length` characters; made-up words and long numbers are of their split."""
    while True:
        kind = rng.random()
        if kind < 0.3:
            text = str(rng.choice(THINGS))
        elif kind < 0.6 or max_length < 3:
            text = number(rng)
        else:
            text = made_up_word(rng)
        if len(text) <= max_length and (len(text) < 3 or kind < 0.3 or is_of(text, split)):
            return text


def spoken(rng: np.random.Generator, split: Split) -> str:
    """Draw one to four words and numbers, which as a whole are of their split."""

    def draw(rng: np.random.Generator) -> str:
        count = rng.integers(1, 5)
        return " ".join(str(rng.choice(NUMBER_WORDS if rng.random() < 0.4 else THINGS)) for _ in range(count))

    return draw_until(rng, split, draw)


def _lines(rng: np.random.Generator, split: Split) -> Page:
    """Draw some words and numbers, anywhere on a page of one to four crops."""
    shapes = (1, 1), (1, 2), (1, 3), (2, 1), (2, 2)
    high, wide = shapes[int(rng.choice(5, p=[0.2, 0.25, 0.35, 0.1, 0.1]))]
    height, width = high * SIDE, wide * SIDE
    rows, found = [BLANK * width] * height, []
    used = sorted(rng.choice(height, rng.integers(1, min(height, 4) + 1), replace=False))
    for row in used:
        room = min(width, _MAX_LETTERS - sum(map(len, found)))
        if room < 1:
            break
        units = [unit(rng, split, room)]
        if width - len(units[0]) > 4 and rng.random() < 0.4:
            units.append(unit(rng, split, width - len(units[0]) - 1))
        found += units
        rows[row] = _spread(rng, units, width)
    return Page(tuple(rows), " ".join(found))


def _cards(rng: np.random.Generator, split: Split) -> Page:
    """Draw names with numbers."""
    width = 3 * SIDE
    entries = [(name, number(rng)[:4]) for name in _names(rng, 6)]
    return _entries(rng, entries, [_spread(rng, entry, width) for entry in entries])


def _charts(rng: np.random.Generator, split: Split) -> Page:
    """Draw bars with their names, and their values at the ends."""
    width = 3 * SIDE
    entries = [(name, str(rng.integers(1, 10))) for name in _names(rng, 5)]
    start = max(len(name) for name, _ in entries) + 1
    bars = [f"{name:{start}}{BAR * ((int(value) + 1) // 2)}{value}" for name, value in entries]
    return _entries(rng, entries, [f"{bar:{width}}" for bar in bars])


def _names(rng: np.random.Generator, max_length: int) -> list[str]:
    """Draw two to four names, no two with the same initial."""
    names: dict[str, str] = {}
    short = [word for word in THINGS if len(word) <= max_length]
    count = rng.integers(2, SIDE + 1)
    while len(names) < count:
        name = str(rng.choice(short))
        names.setdefault(name[0], name)
    return list(names.values())


def _entries(rng: np.random.Generator, entries: Sequence[tuple[str, str]], rows: Sequence[str]) -> Page:
    all_rows = [BLANK * len(rows[0])] * SIDE
    for place, row in zip(sorted(rng.choice(SIDE, len(rows), replace=False)), rows, strict=True):
        all_rows[place] = row
    return Page(tuple(all_rows), " ".join(map(" ".join, entries)), tuple(map(" ".join, entries)))


def _spread(rng: np.random.Generator, units: Sequence[str], width: int) -> str:
    """Return the units in a row, with the blanks that are left anywhere."""
    spare = width - sum(map(len, units)) - (len(units) - 1)
    cuts = np.sort(rng.integers(0, spare + 1, len(units)))
    row, before = "", 0
    for place, (text, cut) in enumerate(zip(units, cuts, strict=True)):
        row += BLANK * (cut - before + (place > 0)) + text
        before = cut
    return f"{row:{width}}"


def crops(page: Page) -> list[str]:
    """Return what each crop shows, its cells row by row: the global view, then the others.

    Of a page of several crops the global view is too small to read, and stands for nothing.
    """
    height, width = len(page.rows), len(page.rows[0])
    cut = [
        "".join(row[x : x + SIDE] for row in page.rows[y : y + SIDE])
        for y in range(0, height, SIDE)
        for x in range(0, width, SIDE)
    ]
    return [cut[0] if len(cut) == 1 else BLANK * SIDE**2, *cut]


def page_as_text(page: Page) -> str:
    """Spell a page in the order of an image's tokens: all rows, the separator of the global view, and its rows."""
    view = crops(page)[0]
    view_rows = [view[i : i + SIDE] for i in range(0, SIDE**2, SIDE)]
    return "".join(row + ROW_END for row in page.rows) + GLOBAL + "".join(row + ROW_END for row in view_rows)


def clip_as_text(rng: np.random.Generator, text: str) -> str:
    """Spell a text in the form of a clip's tokens: letters that last a while, with pauses, as CTC aligns them."""
    out = [PAUSE * rng.integers(0, 4)]
    for letter, following in zip(text, text[1:] + PAUSE, strict=True):
        pauses = max(int(rng.choice(4, p=[0.55, 0.3, 0.1, 0.05])), following == letter)
        out += [letter * int(rng.choice([1, 2, 3], p=[0.85, 0.12, 0.03])), PAUSE * pauses]
    return "".join([*out, PAUSE * rng.integers(0, 6)])


def misheard(rng: np.random.Generator, text: str, stage: Stage) -> str:
    """Misspell a text like the encoder an unknown voice; the decoder, which knows the words, learns to recognise them.

    Half of the texts as they are; of the others up to every fifth letter changed, lost or followed by another.
    """
    rate = max(rng.uniform(-0.2, 0.2), 0)
    if not rate:
        return text
    out = []
    for letter in text:
        if rng.random() < rate:
            like = _VOWELS if letter in _VOWELS else list(LETTERS + BLANK)
            letter = str(rng.choice([*[""] * _LOST[stage], letter + rng.choice(like), *rng.choice(like, 3)]))
        out.append(letter)
    return "".join(out) or text


def text_task(rng: np.random.Generator, split: Split) -> tuple[str, str]:
    """Draw a question in text alone, and its answer."""
    kind = rng.integers(5)
    if kind in (3, 4):
        digits = draw_until(rng, split, number)
        words = " ".join(_UNITS[int(d)] for d in digits)
        return (f"spell {digits}", words) if kind == 3 else (f"number {words}", digits)
    units = [unit(rng, split, 9) for _ in range(rng.integers(2, 5))]
    answer = [" ".join(units), units[0], units[-1]][kind]
    return f"{['copy', 'first of', 'last of'][kind]} {' '.join(units)}", answer


def question_of_page(rng: np.random.Generator, split: Split, kind: str) -> tuple[Page, str, str]:
    """Draw a page to `read`, to `find` a name on, or that is `asked` for one by a clip; its name and the answer."""
    if kind == "read":
        drawn = page(rng, split, "lines" if rng.random() < 0.75 else "charts")
        return drawn, "", drawn.text
    drawn = page(rng, split, "cards" if rng.random() < 0.6 else "charts")
    answer = drawn.entries[rng.integers(len(drawn.entries))]
    return drawn, answer.split()[0], answer


def text_sample(rng: np.random.Generator, split: Split, stage: Stage) -> tuple[str, str]:
    """Draw a question of a text stage: a task in text, or a page and a clip written as text, with marks or without."""
    kind = str(rng.choice(list(_SHARES[stage]), p=list(_SHARES[stage].values())))
    if kind == "task":
        return text_task(rng, split)
    marked = rng.random() < 0.85
    if kind == "hear":
        heard = spoken(rng, split)
        return f"{CLIP * marked}{clip_as_text(rng, misheard(rng, heard, stage))}{HEAR}", heard if marked else UNREAD
    drawn, name, answer = question_of_page(rng, split, kind)
    question = f"{FIND} {name}" if kind == "find" else READ
    if kind == "asked":
        question = f"{CLIP * marked}{clip_as_text(rng, misheard(rng, name, stage))}{FIND}"
    return f"{PAGE * marked}{page_as_text(drawn)}{question}", answer if marked else UNREAD
