"""Compiled programs that outlive the process."""

import os
import subprocess
import sys

import jax
import pytest
from helpers.environment import ONE_DEVICE
from helpers.paths import TINY

from phi4mm_jax.utils import compilation

CODE = """
import jax
found = []
jax.monitoring.register_event_listener(lambda event, **_: found.append(event) if "cache_misses" in event else None)
import phi4mm_jax
phi4mm_jax.load({folder!r}, dtype="float32", scan=True).generate(["<|user|>Hi<|end|><|assistant|>"], max_new_tokens=1)
print(len(found))
"""


@pytest.mark.subprocess
def test_a_second_process_compiles_nothing(tmp_path):
    """`load` keeps programs in the user's cache, where nothing else is said."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_COMPILATION", "JAX_PERSISTENT"))}
    environment |= {"XDG_CACHE_HOME": str(tmp_path), "XLA_FLAGS": ONE_DEVICE}
    misses = []
    for _ in range(2):
        command = [sys.executable, "-c", CODE.format(folder=str(TINY))]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        misses.append(int(run.stdout))
    assert misses[0] > 0
    assert misses[1] == 0
    assert list((tmp_path / "phi4mm-jax" / "compiled").glob("jit__prefill-*"))


@pytest.mark.parametrize(
    ("setting", "value"), [("jax_compilation_cache_dir", "/elsewhere"), ("jax_enable_compilation_cache", False)]
)
def test_what_jax_is_told_stands(monkeypatch, tmp_path, setting, value):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    before = {name: getattr(jax.config, name) for name in ("jax_compilation_cache_dir", "jax_enable_compilation_cache")}
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        jax.config.update(setting, value)
        compilation.keep_compiled_by_default()
        assert getattr(jax.config, setting) == value
        assert not any(tmp_path.iterdir())
    finally:
        for name, old in before.items():
            jax.config.update(name, old)


def test_a_cache_that_cannot_be_written_is_no_error(monkeypatch, tmp_path):
    (tmp_path / "phi4mm-jax").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    before = jax.config.values["jax_compilation_cache_dir"]
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        compilation.keep_compiled_by_default()
        assert jax.config.values["jax_compilation_cache_dir"] is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_caching_that_is_turned_off_stays_off(monkeypatch, tmp_path):
    """--compilation-cache "", though loading a model turns it on by default."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    names = ("jax_compilation_cache_dir", "jax_enable_compilation_cache")
    before = {name: jax.config.values[name] for name in names}
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        compilation.keep_compiled("")
        compilation.keep_compiled_by_default()
        assert jax.config.values["jax_compilation_cache_dir"] is None
        assert not jax.config.values["jax_enable_compilation_cache"]
        assert not any(tmp_path.iterdir())
    finally:
        for name, old in before.items():
            jax.config.update(name, old)
