"""The benchmarks run, and print every row; their times are not asserted."""

import itertools
import json
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
    products = [line.split("|")[-3].strip() for line in lines]
    assert all(float(ratio) > 0 for ratio in products[:8])
    assert not any(products[8:])


@pytest.mark.slow
def test_cpu_weights_prints_its_rows():
    command = [sys.executable, "-m", "benchmarks.cpu_weights", "--small", "--rounds", "1", "--rows", "decoding, 1"]
    environment = os.environ | {"XLA_FLAGS": ONE_DEVICE}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    (row,) = [line.strip("| ").split(" | ") for line in run.stdout.splitlines() if line.startswith("| ")][1:]
    assert row[0] == "decoding, 1 row"
    assert all(float(cell) > 0 for cell in row[1:])


@pytest.mark.slow
def test_random_requests_are_answered_alike_with_drafts():
    command = [sys.executable, "-m", "benchmarks.drafts", "--random", "40", "--slots", "4"]
    environment = os.environ | {"XLA_FLAGS": ONE_DEVICE}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    summary = run.stdout.splitlines()[1]
    assert summary.startswith("40 requests, ")
    assert ": 0 answers differ; " in summary
    assert float(summary.split(", ")[-1].removesuffix(" a step")) > 1.5


def gpu_rows(*arguments, **options) -> tuple[list[dict], str]:
    """Results of `benchmarks.gpu`, printed as they come, and all that it printed."""
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    environment = os.environ | {"XLA_FLAGS": ONE_DEVICE}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True, **options)
    return [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")], run.stdout


def test_gpu_prints_a_table_with_ratios_to_ceilings():
    ceilings = ("read", "copy", "bfloat16 product")
    rows, printed = gpu_rows("--small", "--parts", "ceilings", "--minutes", "2", timeout=120)
    assert [row["row"] for row in rows] == ["platform", *(f"ceiling: {name}" for name in ceilings)]
    assert all(row["value"] > 0 for row in rows[1:])
    lines = [line.split(" | ") for line in printed.splitlines() if line.startswith("| ceiling")]
    assert [lines[i][-2] for i in (0, 2)] == ["1.00"] * 2  # themselves


def test_gpu_starts_no_row_when_its_time_is_over():
    rows, _ = gpu_rows("--part", "kernels", "--seconds", "0", timeout=120)
    assert all(row["error"].startswith("not started") for row in rows)
    sides = ["ours", "XLA"]
    lengths = {4096: [*sides, "cuDNN bare"], 16384: [*sides, "cuDNN bare"], 65536: ["ours", "cuDNN bare"]}
    expected = {f"attention forward and backward, {n} tokens": x for n, x in lengths.items()}
    expected |= {f"attention forward, {n} tokens": x for n, x in (lengths | {131072: lengths[65536]}).items()}
    for shape, dtype in itertools.product(("1 x 131072", "8 x 8192", "64 x 2048"), ("bfloat16", "int8")):
        expected[f"attention of a decoding step, {shape}, {dtype}"] = sides
    found = {name: [row["side"] for row in rows if row["row"] == name] for name in {row["row"] for row in rows}}
    assert found == expected


@pytest.mark.slow
@pytest.mark.torch
def test_gpu_runs_end_to_end_without_one():
    """Whatever needs cuDNN says so in its row; every other row has a value."""
    rows, printed = gpu_rows("--small", "--minutes", "60", timeout=3600)
    assert {row["side"] for row in rows if "error" in row} == {"cuDNN bare", "SDPA cuDNN"}
    errors = [row["value"] for row in rows if row.get("unit") == "error"]
    assert len(errors) == 6 + 2 + 2 * 2 * 3  # whole rows; chunks; decoding steps, by both sides
    assert all(error < 5e-3 for error in errors)  # which no NaN is
    names = {line.split(" | ")[0] for line in printed.splitlines() if line.startswith("| ")}
    for name in (
        "prefill, 128 tokens", "decoding, batch 1, 64 cached", "decoding, batch 2, 64 cached: bytes read",
        "decoding, batch 2, 64 cached, int4", "transcription, batch 2, clips of 10 s", "image encoder, 1 crops",
        "audio encoder, 1 clips of 10 s",
        "speech-adapter tuning, 1 x 64", "load, two layers, from a warm page cache",
    ):  # fmt: skip
        assert f"| {name}" in names
