"""Sizes of the library's and the programs' files and classes: one can be read at a time."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
MAX_FILE, MAX_CLASS = 450, 250  # lines
FILES = [path for folder in ("phi4mm_jax", "convert", "infer", "train") for path in (ROOT / folder).rglob("*.py")]


def sizes(source: str) -> dict[str, int]:
    """Lines of the file, under the name "", and of each of its classes."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)]
    return {"": len(source.splitlines())} | {n.name: (n.end_lineno or 0) - n.lineno + 1 for n in nodes}


def test_lines_are_counted():
    assert sizes("import a\n\n\nclass B:\n    c = 1\n\n    class D:\n        e = 2\n") == {"": 8, "B": 5, "D": 2}


def test_files_and_classes_are_short():
    assert len(FILES) > 150
    found = {(path.relative_to(ROOT), name): lines for path in FILES for name, lines in sizes(path.read_text()).items()}
    limits = {place: MAX_CLASS if place[1] else MAX_FILE for place in found}
    assert {p: n for p, n in found.items() if n > limits[p]} == {}
