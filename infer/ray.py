"""Answer files of prompts on many chips and hosts: python -m infer.ray --model PATH --input GLOB --output FOLDER.

Each chip has an engine of its own, or each group of chips with --mesh tensor=N: independent engines answer more than
one that is spread over all. They are placed by Ray on all hosts of its cluster, or on this host where there is none
(`ray start --head`, and on the other hosts `ray start --address HOST:6379`, make one). Each host needs this package,
the model at the same path, and the media that the lines name.

The input is a file, a folder or a quoted glob, here or at a URL (gs://, s3://, ...). Its lines are those of infer.batch
(`python -m infer.batch --help` tells them). Of Parquet the columns are named as the keys of a line; "messages" and
"grammar" may be JSON, and "images" and "audios" may hold the bytes of files. Without an id a line has the name of its
file and its number, from 0: "b.jsonl:12". Paths are relative to the file; media may be at URLs such as gs:// as well.

The output is a folder, here or at a URL, of parts such as part-000000.jsonl, which have the answers in the order in
which they come: lines as of infer.batch, or with --output-format parquet their keys as columns. A part is written
whole or not at all.

Rerun the same command to resume a run that was stopped, on any number of engines. What has been answered is not
answered again, and what failed is. An engine that dies is replaced, and its lines are asked again. Another model,
setting or line than that of answers which are there is an error; settings.json in the folder has what they depend on.
The exit status is 1 if a line has failed.
"""

import argparse
import sys
from typing import get_args

import phi4mm_jax
from phi4mm_jax.adapters import ADAPTERS
from phi4mm_jax.commands.options import (
    adapter_folders_of,
    adapter_of,
    add_adapter,
    add_adapter_folder,
    add_draft,
    add_draft_tokens,
    add_precision,
    answer_settings,
    draft_tokens_of,
    user_adapter_sizes,
    user_adapters_of,
)
from phi4mm_jax.engine.answer_lines import Format, cut_line
from phi4mm_jax.utils.checks import check_positive
from phi4mm_jax.utils.cli import cli_entrypoint, make_parser, named_options
from phi4mm_jax.utils.progress import count_bar


def parse_arguments() -> argparse.Namespace:
    parser = make_parser("infer.ray", __doc__)
    parser.add_argument("--model", metavar="PATH", required=True, help="the checkpoint's folder, the same on each host")
    parser.add_argument("--input", metavar="GLOB", required=True)
    parser.add_argument("--output", metavar="FOLDER", required=True)
    parser.add_argument("--output-format", choices=("jsonl", "parquet"), default="jsonl", help="(default: %(default)s)")
    parser.add_argument(
        "--format", choices=get_args(Format), default="plain", help="of the answers (default: %(default)s)"
    )
    parser.add_argument("--engines", metavar="N", type=int, help="by default as many as the cluster has chips for")
    parser.add_argument("--mesh", metavar="tensor=N", help="chips of one engine (default: one)")
    parser.add_argument(
        "--cluster", metavar="ADDRESS", default="auto",
        help='of a Ray cluster; "local" for this host alone; by default the one that this host is in, if it is in one',
    )  # fmt: skip
    parser.add_argument(
        "--write-seconds", metavar="N", type=float, default=30.0,
        help="seconds that an answer waits, at most, for others to be written with (default: %(default)g)",
    )  # fmt: skip
    add_precision(parser)
    parser.add_argument(
        "--max-new-tokens", metavar="N", type=int, default=256, help="for lines that do not say (default: %(default)s)"
    )
    parser.add_argument("--slots", metavar="N", type=int, default=8, help="rows that an engine decodes at once")
    parser.add_argument("--cache-tokens", metavar="N", type=int, help="of an engine's rows; by default what fits")
    parser.add_argument("--cache-dtype", choices=("int8",), help="by default the model's")
    parser.add_argument("--beams", metavar="N", type=int, default=1, help="the most that a line may ask for")
    parser.add_argument(
        "--merge", choices=tuple(ADAPTERS), help="add this adapter to the weights: for lines that all need it"
    )
    add_adapter(parser, "NAME alone is for lines that do not say; by default that of a line's media")
    add_adapter_folder(parser)
    add_draft(parser)
    add_draft_tokens(parser)
    parser.add_argument("--warmup", action="store_true", help="compile every program before answering")
    parser.add_argument(
        "--compilation-cache", metavar="DIR",
        help='where compiled programs are kept on each host; "" for nowhere; by default in the user\'s cache',
    )  # fmt: skip
    return parser.parse_args()


@cli_entrypoint
def main() -> int:
    arguments = parse_arguments()
    import jax

    jax.config.update("jax_platforms", "cpu")  # the chips are the engines'
    from phi4mm_jax.engine import EngineConfig
    from phi4mm_jax.ray import run
    from phi4mm_jax.ray.parts import Parts

    parquet = arguments.output_format == "parquet"
    if parquet and arguments.format == "openai":
        raise phi4mm_jax.InputError("--format openai has no columns; give --output-format jsonl")
    with named_options(arguments):
        check_positive("max_new_tokens", arguments.max_new_tokens)
        if arguments.engines is not None:
            check_positive("engines", arguments.engines)
    if not arguments.write_seconds >= 0:
        raise phi4mm_jax.InputError(f"--write-seconds is {arguments.write_seconds:g}; expected 0 or more seconds")
    sizes = {name: getattr(arguments, name) for name in ("slots", "cache_tokens", "cache_dtype", "beams")}
    adapter = adapter_of(arguments)
    sizes |= user_adapter_sizes(arguments) | {"draft_tokens": draft_tokens_of(arguments)}
    with named_options(arguments):
        EngineConfig(**sizes)
    each = chips_of(arguments.mesh)
    lines = {"max_new_tokens": arguments.max_new_tokens}
    given = {"adapter": adapter, "draft": arguments.draft}
    lines |= {name: value for name, value in given.items() if value is not None}
    options = {
        "model": arguments.model, "mesh": arguments.mesh, "engine": sizes | {"cli": True}, "dtype": arguments.dtype,
        "weights": arguments.weights, "merge": arguments.merge, "adapters": adapter_folders_of(arguments),
        "adapters_from": arguments.adapters_from, "user_adapters": user_adapters_of(arguments),
        "warm_up": arguments.warmup, "compilation_cache": arguments.compilation_cache,
    }  # fmt: skip
    parts = Parts(arguments.output, arguments.format, parquet, arguments.write_seconds)
    parts.check_settings(answer_settings(arguments))
    run.connect(arguments.cluster, arguments.engines)
    inputs = run.index_files(arguments.input, lines, parquet, user_adapters_of(arguments))
    failed, done, cut = run.compact(parts, inputs, arguments.format)
    todo = ~done & ~(failed & inputs.broken)
    if not todo.all():
        print(f"{(~todo).sum()} of {len(todo)} lines are answered already; resuming", file=sys.stderr)
    if todo.any():
        engines = run.place_engines(arguments.engines, each)
        print(f"{engines.count} engines of {engines.each} {engines.resource} each", file=sys.stderr)
        with count_bar("Answering", "tokens", len(todo), int((~todo).sum())) as advance:
            run.answer(
                inputs, todo, parts, engines, form=arguments.format, options=options, settings=lines, advance=advance
            )
        failed, done, cut = run.compact(parts, inputs, arguments.format)
    print(f"{arguments.output}: {done.sum() + failed.sum()} answers, {failed.sum()} of them errors", file=sys.stderr)
    if cut.any():
        print(cut_line(cut.sum(), arguments.max_new_tokens), file=sys.stderr)
    if missing := int((~done & ~failed).sum()):
        print(f"{missing} lines have no answer; rerun the same command to ask them again", file=sys.stderr)
    return 1 if missing or failed.any() else 0


def chips_of(mesh: str | None) -> int | None:
    """Return the chips of one engine; None for one chip, or a share of the processors.

    Raises:
        InputError: the mesh has other axes than inference splits over.
    """
    from phi4mm_jax.mesh import parse_mesh

    if mesh is None:
        return None
    sizes = parse_mesh(mesh)
    if others := sorted(axis for axis, size in sizes.items() if axis != "tensor" and size > 1):
        raise phi4mm_jax.InputError(
            f"--mesh is {mesh!r}, but an engine of infer.ray splits over tensor only; leave {others[0]} out"
        )
    return sizes.get("tensor", 1)


if __name__ == "__main__":
    sys.exit(main())
