"""Hours of service, in short: what requests leave behind is nothing."""

import os

import pytest
from helpers.compilations import count_compilations
from helpers.paths import TINY

from phi4mm_jax.testing.soak import Soak

REQUESTS = int(os.environ.get("SOAK_REQUESTS", "600"))


@pytest.mark.slow
def test_many_requests_leak_nothing(tiny):
    """Short requests with cancellations, errors, media and streams among them."""
    soak = Soak(tiny, TINY / "inputs", seed=1)
    soak.run(800)  # warm-up: what allocators keep grows until then
    before, arrays, memory = count_compilations(), soak.live_arrays(), soak.resident()
    answered = soak.run(REQUESTS)
    assert sum(answered.values()) == REQUESTS
    assert all(answered[way] >= REQUESTS // 50 for way in ("length", "cancelled", "error", "closed")), answered
    assert soak.lost() == (0, 0)
    assert count_compilations() == before
    assert soak.live_arrays() == arrays
    assert soak.resident() - memory < 16 << 20
