"""Cases of the goldens."""

import json

from helpers.paths import TINY


def golden_cases() -> list[dict]:
    return json.loads((TINY / "goldens.json").read_text())["cases"]


def golden_gradient_cases() -> list[dict]:
    return json.loads((TINY / "goldens.json").read_text())["grad_cases"]


def media_of(case: dict) -> dict:
    """The case's media, as the arguments of `process` and `generate` for one row."""
    return {
        "images": [[TINY / "inputs" / f"image_{i}.png" for i in case["images"]]],
        "audios": [[TINY / "inputs" / f"audio_{i}.flac" for i in case["audios"]]],
    }


def rows_of(cases: list[dict]) -> tuple[list[str], list[list], list[list]]:
    """Prompts, images and clips of several cases, as `process` and `generate` take them for a row each."""
    media = [media_of(case) for case in cases]
    images, audios = ([of_case[kind][0] for of_case in media] for kind in ("images", "audios"))
    return [case["prompt"] for case in cases], images, audios
