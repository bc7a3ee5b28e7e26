"""Profiles of programs."""

import jax
import jax.numpy as jnp
import pytest

from phi4mm_jax import InputError
from phi4mm_jax.utils.profiling import Profile


def test_a_profile_has_the_phases_by_name(tmp_path):
    @jax.jit
    def step(x):
        with jax.named_scope("a_phase"):
            return jnp.sin(x) @ x

    x = jnp.ones((8, 8))
    with Profile(tmp_path / "profile"):
        step(x).block_until_ready()
    (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
    assert b"a_phase" in trace.read_bytes()


@pytest.mark.parametrize(
    ("total", "done", "count", "traced"),
    [
        (1, 0, 1, [0]),
        (10, 0, 2, [5, 6]),
        (10, 6, 1, [8]),
        (3, 0, 8, [1, 2]),  # no more are left
    ],
)
def test_the_middle_is_traced(tmp_path, monkeypatch, total, done, count, traced):
    tracing, found = [], []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder, profiler_options: tracing.append(folder))
    monkeypatch.setattr(jax.profiler, "stop_trace", tracing.clear)
    with Profile(tmp_path / "profile", total, done, count) as profile:
        for item in range(done, total):
            found += [item] if tracing else []
            profile.advance()
    assert found == traced
    assert not tracing


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/profile: a profile cannot be written there .*choose another folder"):
        Profile(tmp_path / "file" / "profile").__enter__()


def test_without_a_folder_nothing_is_traced(monkeypatch):
    monkeypatch.setattr(jax.profiler, "start_trace", None)
    with Profile(None) as profile:
        profile.advance()
