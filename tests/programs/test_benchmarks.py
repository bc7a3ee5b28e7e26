"""The benchmarks run, and print every row; their times are not asserted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.environment import ONE_DEVICE

pytestmark = pytest.mark.subprocess

ROOT = Path(__file__).parents[2]
ROWS = [
    "image encoder, 1 crop,", "image encoder, 2 crops,", "audio encoder, 1 s,", "audio encoder, 2 s,",
    "prefill, 64 tokens,", "prefill, 128 tokens,", "decoding, batch 1,", "decoding, batch 8,", "mixed batch of 8,",
    "processing of images,", "processing of audio,", "tokenizer,",
]  # fmt: skip


@pytest.mark.slow
def test_vs_transformers_prints_every_row():
    command = [sys.executable, "-m", "benchmarks.vs_transformers", "--small", "--rounds", "1"]
    environment = os.environ | {"XLA_FLAGS": ONE_DEVICE}  # as its users have it
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200)
    assert run.returncode == 0, run.stderr
    lines = [line for line in run.stdout.splitlines() if line.startswith("| ")][1:]
    assert [next((row for row in ROWS if line.startswith(f"| {row}")), line) for line in lines] == ROWS
    assert all(float(line.split("|")[-2]) > 0 for line in lines)
