"""`phi4mm COMMAND`, as it is in an installed wheel."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.paths import TINY

from phi4mm_jax import InputError, __version__
from phi4mm_jax.commands.main import find_command, usage
from phi4mm_jax.training.recipe import load_recipe
from phi4mm_jax.utils.cli import COMMANDS, command_of, with_program_names

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("words", "command", "arguments"),
    [
        ("generate --model m hello", "generate", ["--model", "m", "hello"]),
        ("convert to-torch a b", "convert to-torch", ["a", "b"]),
        ("to-torch a b", "convert to-torch", ["a", "b"]),
        ("dpo train", "train dpo", ["train"]),
    ],
)
def test_words_name_a_command(words, command, arguments):
    assert find_command(words.split()) == (command, arguments)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("nonsense", "no command 'nonsense'; expected generate, chat, batch, "),
        ("train", "phi4mm train needs another word: sft or dpo"),
        ("convert there", "phi4mm convert has no 'there'; expected to-orbax or to-torch"),
    ],
)
def test_other_words_are_an_error(words, message):
    with pytest.raises(InputError, match=message):
        find_command(words.split())


def test_usage_names_every_command():
    files = [path for name in ("convert", "infer", "train") for path in ROOT.glob(f"{name}/*.py")]
    programs = {f"{path.parent.name}.{path.stem}" for path in files if "def main(" in path.read_text()}
    assert {module for module, _ in COMMANDS.values()} == programs - {"infer.demo"}, "a program that no command starts"
    assert [line.split("  ")[1] for line in usage().splitlines() if line.startswith("  ")] == list(COMMANDS)


def test_programs_import_each_other_relatively():
    """Their packages have other names in the wheel."""
    for command, (module, _) in COMMANDS.items():
        tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())
        absolute = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level]
        absolute += [name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names]
        assert not {"convert", "infer", "train"} & {(name or "").partition(".")[0] for name in absolute}, command


def test_a_recipe_by_its_name():
    overrides = ["model=m", "data.sources=[{path: train.jsonl}]"]
    assert load_recipe("text", overrides) == load_recipe(ROOT / "train/recipes/text.yaml", overrides)
    with pytest.raises(InputError, match=r"^txt: there is no such file, and no such recipe .* one of dpo, small, "):
        load_recipe("txt", overrides)
    with pytest.raises(InputError, match=r"^recipes/text\.yaml: there is no such file; the package's is named 'text'$"):
        load_recipe("recipes/text.yaml", overrides)
    with pytest.raises(InputError, match=r"^recipes/txt\.yaml: there is no such file$"):
        load_recipe("recipes/txt.yaml", overrides)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder in which the wheel is installed, made from a copy of what it is made from."""
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for folder in ("convert", "infer", "phi4mm_jax", "train"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", source, source], check=True)
    (wheel,) = source.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", site, wheel], check=True)
    return site


def test_a_program_is_named_as_it_is_started(monkeypatch):
    assert command_of("train.export") == "python -m train.export"  # in a clone
    monkeypatch.setattr("sys.argv", ["phi4mm train sft", "small"])
    assert command_of("train.export") == "phi4mm export"
    assert (
        with_program_names("a line for infer.batch, and convert.verify") == "a line for phi4mm batch, and phi4mm verify"
    )


def phi4mm(site: Path, *arguments: str, path: str = "") -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [path, str(site)]))}
    return subprocess.run(
        [site / "bin" / "phi4mm", *arguments],
        cwd=site.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
@pytest.mark.subprocess
def test_the_wheel_has_one_package_and_all_programs(site):
    assert {path.name for path in site.iterdir()} == {"bin", "phi4mm_jax", f"phi4mm_jax-{__version__}.dist-info"}
    for command, (module, _) in COMMANDS.items():
        assert (site / "phi4mm_jax" / "commands" / f"{module.replace('.', '/')}.py").is_file(), command
    page = {path.name for path in (site / "phi4mm_jax/serve/page").iterdir()}
    assert page == {"index.html", "page.css", "page.js"}
    packed = {path.name for path in (site / "phi4mm_jax/commands/train/recipes").iterdir()}
    assert packed == {path.name for path in (ROOT / "train/recipes").glob("*.yaml")}
    result = phi4mm(site, "--version")
    assert (result.returncode, result.stdout) == (0, f"phi4mm-jax {__version__}\n"), result.stderr


@pytest.mark.slow
@pytest.mark.subprocess
def test_installed_programs_run(site, tiny, tmp_path):
    result = phi4mm(site, "generate", "--model", str(TINY), "--dtype", "float32", "--max-new-tokens", "6", "Describe.")
    (completion,) = tiny.generate([[{"role": "user", "content": "Describe."}]], max_new_tokens=6)
    assert (result.returncode, result.stdout) == (0, completion.text + "\n"), result.stderr

    sample = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "a word"}]}
    (tmp_path / "train.jsonl").write_text(2 * (json.dumps(sample) + "\n"))
    data = f"data.sources=[{{path: {tmp_path / 'train.jsonl'}}}]"
    result = phi4mm(site, "train", "sft", "small", f"model={TINY}", data, f"output={tmp_path / 'run'}", "--dry-run")
    assert result.returncode == 0, result.stderr
    assert "steps of 1 micro-batches" in result.stdout


@pytest.mark.slow
@pytest.mark.subprocess
def test_installed_programs_have_their_names_and_remedies(site, tmp_path):
    usage = phi4mm(site, "verify", "--help").stdout
    assert usage.startswith("usage: phi4mm verify [-h] [--version] --goldens DIR")
    assert "a folder that phi4mm record has written" in usage
    assert "python -m" not in usage

    (tmp_path / "grain.py").write_text("raise ModuleNotFoundError('no', name='grain')")
    for arguments, status, error in (
        (["nonsense"], 2, "error: phi4mm has no command 'nonsense'; expected generate, chat, "),
        (["verify", "x", "--goldens", "nowhere"], 2, "Give a folder that phi4mm record has written."),
        (["train", "sft", "small"], 2, "the extra 'train' brings; pip install 'phi4mm-jax[train] @ file://"),
    ):
        result = phi4mm(site, *arguments, path=str(tmp_path))
        assert result.returncode == status
        (line,) = result.stderr.splitlines()
        assert error in line
