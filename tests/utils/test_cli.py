"""The programs, as a user starts them."""

import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.marks import fast_are
from helpers.paths import TINY

from infer import generate
from phi4mm_jax.training import arguments as training_arguments
from phi4mm_jax.utils import cli

ROOT = Path(__file__).parents[2]


def run(*arguments: str, stdout: Any = subprocess.PIPE, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=300,
    )


@pytest.mark.subprocess
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


@pytest.mark.slow
@pytest.mark.subprocess
def test_generate_from_a_raw_prompt_on_two_devices(tiny, tmp_path):
    prompt, clip = "<|user|><|audio_1|>Transcribe.<|end|><|assistant|>", str(TINY / "inputs" / "audio_0.flac")
    result = run(
        "infer.generate", "--model", str(TINY), "--dtype", "float32", "--raw", "--audio", clip, "--max-new-tokens", "6",
        "--mesh", "tensor=2", "--profile", str(tmp_path), prompt,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert len(list(tmp_path.rglob("*.xplane.pb"))) == 1
    assert "on 2 devices, mesh tensor=2\n" in result.stderr
    (completion,) = tiny.generate([prompt], audios=[[clip]], max_new_tokens=6)
    assert result.stdout == completion.text + "\n"


@pytest.mark.subprocess
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--model", "nowhere", "Hello"], "nowhere"),
        (["--model", str(TINY), "--image", "nowhere.png", "Hello"], "nowhere.png"),
    ],
)
def test_errors_are_one_line_and_a_status(arguments, named):
    result = run("infer.generate", *arguments)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert any(line.startswith("error: ") and named in line for line in result.stderr.splitlines()), result.stderr


PICTURE = str(TINY / "inputs" / "image_0.png")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--max-new-tokens", "0"], "--max-new-tokens is 0"),
        (["--temperature", "nan"], "--temperature is nan"),
        (["--top-k", "-2"], "--top-k is -2"),
        (["--beams", "0"], "--beams is 0"),
        (["--frames", "65"], "--frames is 65"),
        (["--top-p", "2"], "--top-p is 2"),
        (["--seed", "-1"], "--seed is -1"),
        (["--image", "nowhere.png"], "image 1 ('nowhere.png'): the file does not exist"),
        (["--image", str(TINY / "config.json")], "config.json'): the file is in no format"),
        (["--audio", "/"], "audio 1 ('/'): the file cannot be opened (Is a directory)"),
        (["--image", "https://a.b/c.png"], "'https://a.b/c.png': nothing is downloaded"),
        (["--audio", "https://a.b/c.wav"], "'https://a.b/c.wav': nothing is downloaded"),
        (["--raw", "--system", "Be brief."], "--system does not go with --raw"),
        (["--image", PICTURE, "--", "And <|image_2|>?"], "TEXT has <|image_2|>, which would be text"),
        (["--system", "<|audio|>"], "--system has <|audio|>, which would be text"),
        (["--stop", ""], "--stop is empty"),
        (["--raw", "--image", PICTURE], "error: prompt has 0 image placeholder(s), and 1 image(s) are given with it"),
        (["--raw", "--", ""], "error: prompt is empty: pass a string"),
        (["--", ""], "TEXT is empty, and there is no medium; ask something"),
        (["--profile", "/proc/nowhere"], "/proc/nowhere: a profile cannot be written there"),
        (["--stop", os.fsdecode(b"a\xff")], r"--stop is 'a\udcff', which is not UTF-8"),
        (["--system", os.fsdecode(b"a\xff")], r"--system is 'a\udcff', which is not UTF-8"),
        (["--", os.fsdecode(b"a\xff")], r"TEXT is 'a\udcff', which is not UTF-8"),
    ],
)
def test_arguments_are_checked_before_the_checkpoint_is_read(arguments, named, monkeypatch, capsys):
    text = [] if "--" in arguments else ["Hello"]
    monkeypatch.setattr(sys, "argv", ["generate", "--model", "nowhere", *arguments, *text])
    monkeypatch.setattr(generate.phi4mm_jax, "load", None)  # not called
    assert generate.main() == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert named in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--max_new_token", "5", "--model", "x", "hi"],
            "--max_new_token is not an option; did you mean --max-new-tokens?",
        ),
        (["--modell=x", "hi"], "--modell is not an option; did you mean --model?"),
        (["-model", "x", "hi"], "-model is not an option; did you mean --model?"),
        (["--zzz", "--model", "x", "hi"], "--zzz is not an option; --help lists them"),
        (["--model", "x", "--stop", "-y", "hi"], "a value that begins with - is joined to its option by ="),
    ],
)
def test_an_unknown_option_is_named_with_the_nearest(words, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["generate", *words])
    with pytest.raises(SystemExit, match="2"):
        generate.parse_arguments()
    assert said in capsys.readouterr().err


def test_words_that_begin_with_a_dash_and_are_no_option(monkeypatch):
    words = ["--model", "x", "--top-k", "-1", "--top-p=-.5", "--stop", "- a", "--image", "-", "--", "--modell"]
    monkeypatch.setattr(sys, "argv", ["generate", *words])
    found = generate.parse_arguments()
    assert (found.top_k, found.top_p, found.stop, found.image) == (-1, -0.5, ["- a"], ["-"])
    assert found.text == "--modell"


@pytest.mark.parametrize(
    ("option", "remedy"),
    [
        ("--optimizer.learning_rate=1", "settings are written without dashes: optimizer.learning_rate=..."),
        ("--learning-rate=1", "settings are written without dashes: optimizer.learning_rate=..."),
        ("--output_dir=x", "settings are written without dashes: output=..."),
        (
            "--micro_batch_size=4",
            "settings are written without dashes: data.packing.rows=... (of all devices together)",
        ),
        ("--lora_r=8", "an adapter has the rank and scale that it has in the checkpoint"),
        ("--dry_run", "did you mean --dry-run?"),
    ],
)
def test_a_setting_is_no_option(monkeypatch, capsys, option, remedy):
    monkeypatch.setattr(sys, "argv", ["sft", "small", option, "model=x"])
    with pytest.raises(SystemExit, match="2"):
        training_arguments.parse_arguments("train.sft", None, "answers")
    said = " ".join(capsys.readouterr().err.split())
    assert f"{option.partition('=')[0]} is not an option; {remedy}" in said


ANSWER = ("infer.generate", "--model", str(TINY), "--dtype", "float32", "--max-new-tokens", "8", "Describe.")


@pytest.mark.slow
@pytest.mark.subprocess
def test_an_encoding_that_lacks_the_answer(tiny):
    (completion,) = tiny.generate([[{"role": "user", "content": "Describe."}]], max_new_tokens=8)
    assert not completion.text.isascii()
    result = run(*ANSWER, LC_ALL="C", PYTHONIOENCODING="ascii")
    assert result.returncode == 0, result.stderr
    assert result.stdout == completion.text.encode("ascii", "backslashreplace").decode() + "\n"


@pytest.mark.slow
@pytest.mark.subprocess
def test_an_answer_that_cannot_be_written():
    with open("/dev/full", "w") as full:
        result = run(*ANSWER, stdout=full)
    assert result.returncode == 2
    last = result.stderr.splitlines()[-1]
    assert last == "error: the answer cannot be written to standard output: No space left on device"
    assert "Traceback" not in result.stderr


@pytest.mark.subprocess
def test_demo_answers_what_is_expected():
    result = run("infer.demo")
    assert result.returncode == 0, result.stderr
    said = {
        kind: re.findall(rf"^{kind} +(.*)$", result.stdout, re.M) for kind in ("answer", "expected", "image", "audio")
    }
    assert said["answer"] == said["expected"]
    assert len(said["answer"]) == 4
    media = said["image"] + said["audio"]
    assert len(said["image"]) == len(said["audio"]) == 2
    assert all(Path(ROOT, path).is_file() for path in media)


# ---------------------------------------------------------------------------------------------- starts and ends


def test_a_log_line_is_said_once(capsys):
    """Though another library has given the root logger a handler."""

    @cli.cli_entrypoint
    def program() -> int:
        logging.getLogger("phi4mm_jax.part").warning("said")
        return 0

    other = logging.StreamHandler(sys.stderr)
    logging.getLogger().addHandler(other)
    try:
        assert program() == 0
    finally:
        logging.getLogger().removeHandler(other)
    assert capsys.readouterr().err == "said\n"


@pytest.mark.subprocess
def test_a_program_that_handles_ctrl_c_says_at_once_what_it_does():
    """Afterwards it says nothing."""
    code = """
import os, signal, threading
from phi4mm_jax.utils import cli
cli.handle_errors()
noted = []
signal.signal(signal.SIGINT, lambda *_: noted.append(1))
with cli.interruption_says("saving"):
    threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    os.waitpid(os.spawnlp(os.P_NOWAIT, "sleep", "sleep", "0.6"), 0)
    assert noted
os.kill(os.getpid(), signal.SIGINT)
"""
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (found.returncode, found.stderr) == (0, "\nsaving\n")


@pytest.mark.subprocess
@pytest.mark.parametrize("platform", fast_are(["cuda"], ["cuda", "rocm"]))
def test_a_missing_backend_is_one_line(platform):
    result = run("infer.generate", "--model", str(TINY), "hello", JAX_PLATFORMS=platform)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith(f"error: JAX_PLATFORMS is '{platform}', which jax cannot use here")
    assert ("pip install '.[cuda]'" in last) == (platform == "cuda")


@pytest.mark.subprocess
@pytest.mark.parametrize(
    ("program", "package", "extra"),
    [
        (("train.sft", "recipe.yaml"), "yaml", "train"),
        (("train.tiny.letters", "--help"), "tensorboardX", "train"),
        (("infer.evaluate", "--model", str(TINY), "--task", "exact", "m.jsonl"), "rapidfuzz", "evaluate"),
        (("infer.ray", "--model", str(TINY), "--input", "m.jsonl", "--output", "out"), "pyarrow", "ray"),
        (("infer.demo",), "numpy", "cpu"),
        (("convert.to_torch", "--help"), "jax", "tpu"),
    ],
)
def test_a_missing_extra_is_one_line(program, package, extra, tmp_path):
    (tmp_path / f"{package}.py").write_text(f"raise ModuleNotFoundError('No module named {package}', name='{package}')")
    (tmp_path / "m.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}], "answer": "b"}\n')
    arguments = [str(tmp_path / a) if a == "m.jsonl" else a for a in program]
    result = run(*arguments, PYTHONPATH=str(tmp_path))
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert package in line
    assert "pip install '" in line
    assert f"'.[{extra}]'" in line


@pytest.mark.subprocess
@pytest.mark.parametrize("moment", fast_are(["compiling"], ["importing", "compiling", "compiling for long"]))
def test_ctrl_c_ends_a_program_wherever_it_is(moment, tmp_path):
    """While extensions are imported, and while XLA compiles, which Python cannot interrupt."""
    program = subprocess.Popen(
        [sys.executable, "-m", "infer.generate", "--model", str(TINY), "hello"],
        cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(tmp_path)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    if moment == "importing":
        maps = Path(f"/proc/{program.pid}/maps")
        while "jaxlib" not in maps.read_text():
            time.sleep(0.01)
    else:
        while not any(tmp_path.iterdir()):  # the first program is compiled, many follow
            assert program.poll() is None
            time.sleep(0.01)
        time.sleep(2.0 if moment == "compiling for long" else 0.0)
    program.send_signal(signal.SIGINT)
    sent = time.monotonic()
    output, errors = program.communicate(timeout=60)
    print(f"{moment}: ended after {time.monotonic() - sent:.2f} s")
    assert program.returncode == 130
    assert output == ""
    assert "Traceback" not in errors
    assert errors.splitlines()[-1] == "interrupted"
