"""Options that several programs of inference and conversion share, and the model and engine that they ask for."""

import argparse
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any, get_args

from phi4mm_jax.adapters import ADAPTERS, adapter_choices
from phi4mm_jax.errors import InputError
from phi4mm_jax.quantization import Weights
from phi4mm_jax.utils.cli import named_options
from phi4mm_jax.utils.compilation import default_folder


def add_adapter_folder(parser: argparse.ArgumentParser, adapters_from: bool = True) -> None:
    """Give a program the options --adapter-folder, which `adapter_folders_of` reads, and --adapters-from.

    Args:
        adapters_from: whether the program reads the original layout, for which the latter is.
    """
    parser.add_argument(
        "--adapter-folder", metavar="NAME=FOLDER", action="append", default=[],
        help="an adapter's folder, of PEFT or train.export, in place of the checkpoint's own: speech=FOLDER or "
        "vision=FOLDER; may be given for each",
    )  # fmt: skip
    if adapters_from:
        add_adapters_from(parser)


def add_adapters_from(parser: argparse.ArgumentParser) -> None:
    """Give a program the option --adapters-from."""
    parser.add_argument(
        "--adapters-from", choices=("folders", "shards"),
        help="of a checkpoint in the original layout, which has its adapters twice: by default from vision-lora, "
        "speech-lora ... where these differ from the shards",
    )  # fmt: skip


def adapter_folders_of(arguments: argparse.Namespace) -> dict[str, str]:
    """Return the adapters that --adapter-folder names, as `phi4mm_jax.load` takes them.

    Raises:
        InputError: one is not NAME=FOLDER, or a name is there twice.
    """
    expected = " or ".join(f"{name}=FOLDER" for name in ADAPTERS)
    return _folders_by_name("--adapter-folder", arguments.adapter_folder, expected, ADAPTERS)


class _AdapterAction(argparse.Action):
    """Keep NAME=FOLDER among `user_adapter`, and a NAME alone as `adapter`."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if "=" in values:
            namespace.user_adapter = [*namespace.user_adapter, values]
        elif namespace.adapter is not None:
            raise InputError(f"--adapter asks for {namespace.adapter} and for {values}; give one, or NAME=FOLDER")
        else:
            namespace.adapter = values


def add_adapter(parser: argparse.ArgumentParser, default: str) -> None:
    """Give a program the option --adapter, which `adapter_of` and `user_adapters_of` read.

    Args:
        default: says which adapter is asked for without it.
    """
    parser.set_defaults(user_adapter=[])
    parser.add_argument(
        "--adapter", metavar="NAME[=FOLDER]", action=_AdapterAction,
        help=f"ask for an adapter: {', '.join(adapter_choices())}, or one of PEFT or train.export that is loaded from "
        f"FOLDER; may be given several times; {default}",
    )  # fmt: skip


def adapter_of(arguments: argparse.Namespace, *, use_given: bool = False) -> str | None:
    """Return the adapter that --adapter asks for; None: that of the media.

    Args:
        use_given: the only one that is loaded is asked for, where no other is named.

    Raises:
        InputError: there is no such adapter, or several are loaded and none is asked for.
    """
    users, asked = user_adapters_of(arguments), arguments.adapter
    if asked is None:
        if use_given and len(users) > 1:
            first = next(iter(users))
            raise InputError(f"--adapter loads {', '.join(users)}; say which one answers, such as --adapter {first}")
        return next(iter(users), None) if use_given else None
    builtin, beside, name = asked.rpartition("+")
    if asked not in adapter_choices() and (name not in users or (beside and builtin not in adapter_choices())):
        names = ", ".join((*adapter_choices(), *users))
        raise InputError(f"--adapter is {asked!r:.60}; expected one of {names}, or NAME=FOLDER")
    return asked


def add_user_adapters(parser: argparse.ArgumentParser) -> None:
    """Give a server the options of users' adapters, which `user_adapters_of` and `adapter_places` read."""
    parser.add_argument(
        "--adapter", dest="user_adapter", metavar="NAME=FOLDER", action="append", default=[],
        help="an adapter of PEFT or train.export beside the model's own, which is asked for by its name; may be given "
        "several times",
    )  # fmt: skip
    parser.add_argument(
        "--max-adapters", metavar="N", type=int, help="places for them, by default as many as are given"
    )
    parser.add_argument(
        "--max-adapter-rank", metavar="N", type=int, default=64, help="the largest of theirs (default: %(default)s)"
    )


def user_adapters_of(arguments: argparse.Namespace) -> dict[str, str]:
    """Return the folders that --adapter names, by name.

    Raises:
        InputError: one is not NAME=FOLDER, or a name is there twice, or cannot be used.
    """
    from phi4mm_jax.engine.user_adapters import check_name

    folders = _folders_by_name("--adapter", arguments.user_adapter, "NAME=FOLDER")
    for name in folders:
        check_name(name)
    return folders


def _folders_by_name(option: str, given: Sequence[str], expected: str, names: Collection[str] = ()) -> dict[str, str]:
    """Return what an option gives as NAME=FOLDER; errors show what is `expected`. By default any name is taken."""
    folders: dict[str, str] = {}
    for text in given:
        name, _, folder = text.partition("=")
        if not folder or (names and name not in names):
            raise InputError(f"{option} is {text!r:.200}; expected {expected}")
        if name in folders:
            raise InputError(f"{option} has {name} twice: {folders[name]} and {folder}; give it once")
        folders[name] = folder
    return folders


def user_adapter_sizes(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the sizes of `EngineConfig` for those that --adapter loads: a place for each, of the largest one's rank.

    Raises:
        CheckpointError, ConfigError, InputError: there is no such adapter or model, or a setting is not supported.
    """
    from phi4mm_jax.checkpoint.hub import local_folder
    from phi4mm_jax.checkpoint.peft import user_adapter_rank
    from phi4mm_jax.config import Phi4MMConfig

    if not (users := user_adapters_of(arguments)):
        return {}
    decoder = Phi4MMConfig.from_folder(local_folder(arguments.model)).decoder
    rank = max(user_adapter_rank(folder, decoder) for folder in users.values())
    return {"max_adapters": len(users), "max_adapter_rank": rank}


def user_adapter_digests(arguments: argparse.Namespace) -> dict[str, str] | None:
    """Return the fingerprint of each adapter that --adapter loads, by name; None where it loads none.

    Raises:
        CheckpointError: there is no such folder, or no adapter in it.
    """
    from phi4mm_jax.checkpoint.peft import user_adapter_folder
    from phi4mm_jax.utils.fingerprint import folder_fingerprint

    found: dict[str, str] = {}
    for name, folder in sorted(user_adapters_of(arguments).items()):
        place, replaces = user_adapter_folder(folder)
        found[name] = folder_fingerprint(place) + (f" in place of {replaces}" if replaces else "")
    return found or None


def adapter_places(arguments: argparse.Namespace) -> dict[str, int]:
    """Return the sizes of `EngineConfig` for a server's users' adapters.

    Raises:
        InputError: more are given than there are places.
    """
    count = len(user_adapters_of(arguments))
    places = count if arguments.max_adapters is None else arguments.max_adapters
    if count > places:
        raise InputError(f"--max-adapters is {places}, but {count} are given by --adapter; expected at least that")
    return {"max_adapters": places, "max_adapter_rank": arguments.max_adapter_rank}


def add_layout(parser: argparse.ArgumentParser, adapters: str) -> None:
    """Give a program the options --layout and --adapters-only, for which `with_layout` looks after parsing.

    Args:
        adapters: what --adapters-only writes.
    """
    parser.add_argument(
        "--layout", choices=("original", "native"),
        help="as published (model_type phi4mm), which vLLM serves; or as transformers and PEFT save it "
        "(phi4_multimodal). Must be given, but with --adapters-only, where native is the default",
    )  # fmt: skip
    parser.add_argument("--adapters-only", action="store_true", help=f"write {adapters}")


def with_layout(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> argparse.Namespace:
    """Return the arguments with the layout of --adapters-only where none is given; an error without either."""
    if arguments.layout is None and not arguments.adapters_only:
        parser.error("--layout is needed: original or native; --help says what they are")
    arguments.layout = arguments.layout or "native"
    return arguments


def add_mesh(parser: argparse.ArgumentParser) -> None:
    """Give a program the option --mesh, which `mesh_of` reads."""
    parser.add_argument(
        "--mesh", metavar="tensor=N",
        help="devices that share the heads and the cache; by default as many of this host's TPUs or GPUs as can; "
        "context=M,tensor=N has M times as many, which share the tokens of each page and of a prompt",
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


def add_precision(parser: argparse.ArgumentParser) -> None:
    """Give a program the options --dtype and --weights, which `load_model` reads."""
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="(default: %(default)s)")
    add_weights(parser)


def add_weights(parser: argparse.ArgumentParser) -> None:
    """Give a program the option --weights, which `load_model` reads."""
    parser.add_argument(
        "--weights", choices=get_args(Weights),
        help="quantise the linear maps, to a half or a quarter of bfloat16's bytes; by default they are as stored",
    )  # fmt: skip


def add_draft(parser: argparse.ArgumentParser) -> None:
    """Give a program the option --draft: of `Request.draft`."""
    from phi4mm_jax.engine.request import Draft

    parser.add_argument(
        "--draft", choices=get_args(Draft),
        help="guess tokens by those that followed the last ones before, and compute several in a step: the answers are "
        "the same",
    )  # fmt: skip


def add_draft_tokens(parser: argparse.ArgumentParser) -> None:
    """Give a program the option --draft-tokens, which `draft_tokens_of` reads."""
    from phi4mm_jax.engine.config import DRAFT_TOKENS

    parser.add_argument(
        "--draft-tokens", metavar="N", type=int,
        help=f"the most that are guessed in a step (default: {DRAFT_TOKENS} with --draft, else none)",
    )  # fmt: skip


def draft_tokens_of(arguments: argparse.Namespace) -> int:
    """Return the size of `EngineConfig` for drafts, by --draft-tokens, where a program has it, and --draft."""
    from phi4mm_jax.engine.config import DRAFT_TOKENS

    if (given := getattr(arguments, "draft_tokens", None)) is not None:
        return given
    return 0 if arguments.draft is None else DRAFT_TOKENS


def add_compilation_cache(parser: argparse.ArgumentParser) -> None:
    """Give a program the option --compilation-cache, which `keep_compiled` takes."""
    parser.add_argument(
        "--compilation-cache", metavar="DIR", default=str(default_folder()),
        help='where compiled programs are kept for the next run; "" for nowhere (default: %(default)s)',
    )  # fmt: skip


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
        user_adapters=user_adapter_digests(arguments), **{name: getattr(arguments, name) for name in names},
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
    from phi4mm_jax.utils.progress import weights_bar

    adapters, mesh = adapter_folders_of(arguments), mesh_of(arguments)
    if notice and (line := notice_of(local_folder(arguments.model))) is not None:
        print(line, file=sys.stderr)
    with weights_bar("Reading", "the weights", arguments.weights) as advance, named_options(arguments):
        return phi4mm_jax.load(
            arguments.model, dtype=arguments.dtype, weights=arguments.weights, mesh=mesh, adapters=adapters,
            adapters_from=arguments.adapters_from, progress=advance, **options,
        )  # fmt: skip


def make_engine(model: Any, config: Any, adapters: Mapping[str, str] | None = None) -> Any:
    """Return an engine of the model, whose cache's size is said on standard error.

    Args:
        adapters: folders of users' adapters to load, by name.

    Raises:
        CheckpointError, ConfigError, InputError: an adapter cannot be loaded.
    """
    engine = model.engine(config)
    for name, folder in (adapters or {}).items():
        engine.load_adapter(name, folder)
    print(f"a cache of {engine.config.cache_tokens} tokens", file=sys.stderr)
    return engine
