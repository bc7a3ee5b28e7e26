"""Make what the small model learns from, and what it is measured on.

    python -m train.tiny.data DESTINATION

DESTINATION gets manifests with their pictures and clips, and those of held/, whose fonts, voices and content are
others. The same seed gives the same data. Needs espeak-ng and fonts of Debian's packages.
"""

import json
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from phi4mm_jax.utils.cli import cli_entrypoint, make_parser
from phi4mm_jax.utils.paths import path_argument
from train.tiny import content, pictures, speech
from train.tiny.content import Split

COUNTS: dict[Split, dict[str, int]] = {
    "train": {
        "text": 180_000, "more": 60_000, "speech": 9000, "pictures": 12_000, "asked": 3000,
        "speech_hard": 5000, "speech_refused": 1500, "vision_refused": 1500,
    },
    "held": {"text": 400, "ocr": 400, "speech": 400, "asked": 400},
}  # fmt: skip
_SHARE = 200  # samples that a process makes at a time
Part = dict[str, Any]


def sample(kind: str, rng: np.random.Generator, split: Split, folder: Path, number: int) -> dict[str, Any]:
    """Return a line of a manifest; its media are written beside it."""
    if kind in ("text", "more"):
        held = split == "held"
        question, answer = content.text_task(rng, split) if held else content.text_sample(rng, split, kind)
        return line([text(question)], answer)
    if kind in ("speech", "speech_hard"):
        spoken = content.spoken(rng, split)
        return line([clip(rng, spoken, split, folder, f"{kind}_{number}"), text(content.HEAR)], spoken)
    asks = {"asked": "asked", "vision_refused": "asked", "speech_refused": str(rng.choice(["read", "find", "asked"]))}
    asked = asks.get(kind, "find" if rng.random() < 0.2 else "read")
    page, name, answer = content.question_of_page(rng, split, asked)
    question = {"read": content.READ, "find": f"{content.FIND} {name}", "asked": content.FIND}[asked]
    if kind == "speech_refused":  # each adapter is asked for what is the other's, lest it gives that too
        spoken = clip(rng, name or str(rng.choice(content.THINGS)), split, folder, f"{kind}_{number}")
        return line([text(content.page_as_text(page)), spoken, text(question)], content.UNREAD)
    parts = [image(rng, page, split, folder, f"{kind}_{number}")]
    if asked == "asked":
        parts.append(clip(rng, name, split, folder, f"{kind}_{number}"))
    if kind == "vision_refused":
        return line([*parts, text(content.HEAR)], content.UNREAD)
    return line([*parts, text(question)], answer)


def text(words: str) -> Part:
    return {"type": "text", "text": words}


def image(rng: np.random.Generator, page: content.Page, split: Split, folder: Path, name: str) -> Part:
    path = f"images/{name}.jpg"
    picture = pictures.draw(rng, page, pictures.fonts_of(split))
    (folder / path).write_bytes(pictures.as_jpeg(rng, picture))
    return {"type": "image", "image": path}


def clip(rng: np.random.Generator, words: str, split: Split, folder: Path, name: str) -> Part:
    path, hard = f"clips/{name}.ogg", name.startswith("speech_hard")
    (folder / path).write_bytes(speech.as_ogg(speech.say(rng, words, speech.voices_of(split), hard=hard)))
    return {"type": "audio", "audio": path}


def line(question: list[Part], answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def share(kind: str, split: Split, folder: Path, start: int, stop: int) -> list[str]:
    rng = np.random.default_rng([sum(kind.encode()), split == "held", start])
    return [json.dumps(sample(kind, rng, split, folder, number)) for number in range(start, stop)]


def shares(kind: str, split: Split, folder: Path, count: int) -> Iterator[tuple[str, Split, Path, int, int]]:
    for start in range(0, count, _SHARE):
        yield (kind, split, folder, start, min(start + _SHARE, count))


@cli_entrypoint
def main() -> int:
    parser = make_parser("train.tiny.data", __doc__)
    parser.add_argument("destination", metavar="DESTINATION", type=path_argument)
    destination = parser.parse_args().destination
    with ProcessPoolExecutor() as pool:
        for split, counts in COUNTS.items():
            folder = destination / "held" if split == "held" else destination
            for media in ("images", "clips"):
                (folder / media).mkdir(parents=True, exist_ok=True)
            for kind, count in counts.items():
                made = pool.map(share, *zip(*shares(kind, split, folder, count), strict=True))
                with (folder / f"{kind}.jsonl").open("w") as manifest:
                    for lines in made:
                        manifest.writelines(f"{one}\n" for one in lines)
                print(f"{folder / kind}.jsonl: {count} samples", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
