"""Log of absl, to which Orbax reports its steps."""

import contextlib
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def absl_log_level(level: int) -> Iterator[None]:
    """Drop absl's records below a level of `logging` in this context; `logging.CRITICAL + 1` drops all."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)
