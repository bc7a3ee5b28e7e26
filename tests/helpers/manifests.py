"""Manifests of conversations."""

import json
from pathlib import Path


def write(path: Path, lines) -> Path:
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
    return path


def user(*content) -> dict:
    return {"role": "user", "content": [{"type": "text", "text": c} if isinstance(c, str) else c for c in content]}


def assistant(text) -> dict:
    return {"role": "assistant", "content": text}
