"""Folders of the tests."""

from pathlib import Path

FIXTURES = Path(__file__).parent.parent / "fixtures"
TINY = FIXTURES / "ms_tiny"  # a checkpoint of the original layout, its goldens and their inputs
