"""Options that several programs of inference and conversion share, and the model and engine that they ask for."""

import argparse
import sys
from typing import Any, get_args

from phi4mm_jax.adapters import ADAPTERS
from phi4mm_jax.errors import InputError
from phi4mm_jax.quantization import Weights
from phi4mm_jax.utils.cli import named_options


def add_adapter_folder(parser: argparse.ArgumentParser) -> None:
    """Give a program the options --adapter-folder, which `adapter_folders_of` reads, and --adapters-from."""
    parser.add_argument(
        "--adapter-folder", metavar="NAME=FOLDER", action="append", default=[],
        help="an adapter's folder, of PEFT or train.export, in place of the checkpoint's own: speech=FOLDER or "
        "vision=FOLDER; may be given for each",
    )  # fmt: skip
    add_adapters_from(parser)


def add_adapters_from(parser: argparse.ArgumentParser) -> None:
    """Give a program the option --adapters-from."""
    parser.add_argument(
        "--adapters-from", choices=("folders", "shards"),
        help="of a checkpoint in the original layout, which has its adapters twice: by default from vision-lora, "
        "speech-lora ... where these differ from the shards",
    )  # fmt: skip


def add_mesh(parser: argparse.ArgumentParser) -> None:
    """Give a program the option --mesh, which `mesh_of` reads."""
    parser.add_argument(
        "--mesh", metavar="tensor=N",
        help="devices that share the heads and the cache; by default as many of this host's TPUs or GPUs as can; "
        "context=M,tensor=N has M times as many, which share the tokens of each page and of a prompt",
    )  # fmt: skip


def add_weights(parser: argparse.ArgumentParser) -> None:
    """Give a program the option --weights, which `load_model` reads."""
    parser.add_argument(
        "--weights", choices=get_args(Weights),
        help="quantise the linear maps, to a half or a quarter of bfloat16's bytes; by default they are as stored",
    )  # fmt: skip


def mesh_of(arguments: argparse.Namespace) -> Any:
    """Return the mesh for the program's model, as `phi4mm_jax.load` takes it; says which on standard error.

    Raises:
        InputError: --mesh is not one that inference can use with this model here.
    """
    from phi4mm_jax.checkpoint.hub import local_folder
    from phi4mm_jax.config import Phi4MMConfig
    from phi4mm_jax.mesh import inference_mesh

    config = Phi4MMConfig.from_folder(local_folder(arguments.model)).decoder
    with named_options(arguments):
        mesh = inference_mesh(arguments.mesh, config)
    if mesh is not None:
        axes = ",".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
        print(f"on {mesh.size} devices, mesh {axes}", file=sys.stderr)
    return mesh


def adapter_folders_of(arguments: argparse.Namespace) -> dict[str, str]:
    """Return the adapters that --adapter-folder names, as `phi4mm_jax.load` takes them.

    Raises:
        InputError: one is not NAME=FOLDER, or a name is there twice.
    """
    folders: dict[str, str] = {}
    for given in arguments.adapter_folder:
        name, equals, folder = given.partition("=")
        if not equals or not folder or name not in ADAPTERS:
            expected = " or ".join(f"{name}=FOLDER" for name in ADAPTERS)
            raise InputError(f"--adapter-folder is {given!r:.200}; expected {expected}")
        if name in folders:
            raise InputError(f"--adapter-folder has {name} twice: {folders[name]} and {folder}; give it once")
        folders[name] = folder
    return folders


def answer_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that a batch's answers depend on besides its lines.

    All are there, None included: answers that were made with a setting are not continued without it. Those of earlier
    versions, which lack a setting, were made without.

    Raises:
        CheckpointError, InputError: there is no such model or adapter.
    """
    from phi4mm_jax.engine.provenance import settings_of

    names = "dtype", "merge", "adapter", "cache_dtype", "max_new_tokens", "adapters_from"
    return settings_of(
        arguments.model, adapter_folders_of(arguments), quantized=arguments.weights,
        **{name: getattr(arguments, name) for name in names},
    )  # fmt: skip


def load_model(arguments: argparse.Namespace, *, notice: bool = False, **options: Any) -> Any:
    """Load the model that a program's options name: --model, --dtype, --weights, --mesh, --adapter-folder,
    --adapters-from.

    Args:
        notice: print what the model's card says to those who ask it, where it does, on standard error.
        options: further arguments of `phi4mm_jax.load`.

    Raises:
        CheckpointError, ConfigError, InputError: as `phi4mm_jax.load`; they name the program's options.
    """
    import phi4mm_jax
    from phi4mm_jax.checkpoint.hub import local_folder
    from phi4mm_jax.checkpoint.model_card import notice_of
    from phi4mm_jax.utils.progress import progress_bar

    adapters, mesh = adapter_folders_of(arguments), mesh_of(arguments)
    if notice and (line := notice_of(local_folder(arguments.model))) is not None:
        print(line, file=sys.stderr)
    with progress_bar("Reading the weights", size=True) as advance, named_options(arguments):
        return phi4mm_jax.load(
            arguments.model, dtype=arguments.dtype, weights=arguments.weights, mesh=mesh, adapters=adapters,
            adapters_from=arguments.adapters_from, progress=advance, **options,
        )  # fmt: skip


def make_engine(model: Any, config: Any) -> Any:
    """Return an engine of the model, whose cache's size is said on standard error."""
    engine = model.engine(config)
    print(f"a cache of {engine.config.cache_tokens} tokens", file=sys.stderr)
    return engine
