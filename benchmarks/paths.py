"""Folders that benchmarks read, and the release's configuration."""

from pathlib import Path

from phi4mm_jax.config import Phi4MMConfig, read_json

ROOT = Path(__file__).parent.parent
SMALL_MODEL = ROOT / "assets" / "tiny"
FIXTURES = ROOT / "tests" / "fixtures"
TINY = FIXTURES / "ms_tiny"  # the tests' checkpoint
HELD = FIXTURES / "held"  # the small model's held-out sets
RELEASE = FIXTURES / "ms_release_config.json"


def release_config() -> Phi4MMConfig:
    """Return the configuration of the release."""
    return Phi4MMConfig.from_dict(read_json(RELEASE))
