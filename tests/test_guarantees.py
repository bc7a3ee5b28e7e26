"""The table of docs/testing.md: each guarantee is met by tests that are there and are not slow."""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent
TABLE = (TESTS.parent / "docs" / "testing.md").read_text().split("## Guarantees")[1]
ROWS = [line for line in TABLE.splitlines() if line.startswith("| ")][1:]


def test_each_guarantee_has_a_fast_test():
    assert len(ROWS) > 20
    for row in ROWS:
        named = re.findall(r"`([\w/]+\.py)::(\w+)`", row)
        assert named, row
        for file, test in named:
            tree = ast.parse((TESTS / file).read_text())
            found = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == test]
            assert len(found) == 1, f"{file}::{test}: there is no such test"
            marks = [ast.unparse(mark) for mark in found[0].decorator_list]
            assert "pytest.mark.slow" not in marks, f"{file}::{test} is slow"
