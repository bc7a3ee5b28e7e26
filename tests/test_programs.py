"""The programs, as a user starts them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY

ROOT = Path(__file__).parents[1]


def run(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


def test_generate(tiny):
    image = str(TINY / "inputs" / "image_0.png")
    result = run(
        "infer.generate",
        "--model",
        str(TINY),
        "--dtype",
        "float32",
        "--image",
        image,
        "--max-new-tokens",
        "6",
        "Describe.",
    )
    assert result.returncode == 0, result.stderr
    chat = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "Describe."}]}]
    (completion,) = tiny.generate([chat], max_new_tokens=6)
    assert result.stdout == completion.text + "\n"


def test_generate_from_a_raw_prompt(tiny):
    prompt, clip = "<|user|><|audio_1|>Transcribe.<|end|><|assistant|>", str(TINY / "inputs" / "audio_0.flac")
    result = run(
        "infer.generate", "--model", str(TINY), "--dtype", "float32", "--raw", "--audio", clip, "--max-new-tokens", "6",
        prompt,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    (completion,) = tiny.generate([prompt], audios=[[clip]], max_new_tokens=6)
    assert result.stdout == completion.text + "\n"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--model", "nowhere", "Hello"], "nowhere"),
        (["--model", str(TINY), "--image", "nowhere.png", "Hello"], "nowhere.png"),
        (["--model", str(TINY), "--max-new-tokens", "0", "Hello"], "max_new_tokens"),
    ],
)
def test_errors_are_one_line_and_a_status(arguments, named):
    result = run("infer.generate", *arguments)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert any(line.startswith("error: ") and named in line for line in result.stderr.splitlines()), result.stderr


def test_demo_shows_what_went_in_and_out():
    result = run("infer.demo")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("\nin   ") == result.stdout.count("\nout  ") == 3
    assert "image_1.png" in result.stdout
    assert "audio_1.flac" in result.stdout
