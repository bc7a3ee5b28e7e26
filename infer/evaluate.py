"""Measure a model on benchmarks: python -m infer.evaluate --model PATH --task asr MANIFEST...

A manifest has an item a line, as in training: "messages", whose last one is the answer that is expected. Others that
are accepted as well are in "answers". The tasks:

    asr     word and character error rates, of texts that are normalised as Whisper does it
    ast     sacreBLEU; of an answer with <sep>, what comes after it
    ocr     exact match, and ANLS
    vqa     likewise
    exact   exact match

Items that fail count as wrong, and are named. With --output, the folder gets report.json (all figures), items.jsonl
(each item with its answer and metrics) and answers.jsonl, from which the same command resumes after it was stopped.
docs/evaluation.md tells how to get the benchmarks.

Of several hosts each runs the same command and answers its share with an engine of its own; the first one writes the
report. TPU VMs, GKE and SLURM say which host a process is, elsewhere the options do.
"""

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

import phi4mm_jax
from phi4mm_jax.adapters import adapter_choices
from phi4mm_jax.commands.options import (
    adapter_folders_of,
    adapter_of,
    add_adapter,
    add_adapter_folder,
    add_compilation_cache,
    add_draft,
    add_draft_tokens,
    add_mesh,
    add_precision,
    draft_tokens_of,
    load_model,
    make_engine,
    user_adapter_digests,
    user_adapter_sizes,
    user_adapters_of,
)
from phi4mm_jax.engine import EngineConfig
from phi4mm_jax.evaluation.answers import (
    AUTO,
    Answer,
    answer_file,
    check_adapter,
    claim_folder,
    read_answers,
    settings_of,
)
from phi4mm_jax.evaluation.items import Item, read_items
from phi4mm_jax.evaluation.metrics import NORMALIZERS
from phi4mm_jax.evaluation.published import PUBLISHED
from phi4mm_jax.evaluation.report import TASKS, Measure, notes, table, write_report
from phi4mm_jax.training.hosts import (
    add_host_options,
    check_same_on_all_hosts,
    check_shared_filesystem,
    collect,
    connected_hosts,
    coordination_of,
    deal_out,
    is_primary_process,
)
from phi4mm_jax.utils.checks import check_positive
from phi4mm_jax.utils.cli import cli_entrypoint, make_parser, named_options
from phi4mm_jax.utils.compilation import keep_compiled
from phi4mm_jax.utils.paths import path_argument
from phi4mm_jax.utils.profiling import Profile, add_profile, check_profile
from phi4mm_jax.utils.progress import count_bar

_WIDTH = 120  # of the table, where the output is not a terminal


def parse_arguments() -> argparse.Namespace:
    parser = make_parser("infer.evaluate", __doc__)
    parser.add_argument("manifests", metavar="MANIFEST", type=path_argument, nargs="+", help="each is a set of its own")
    parser.add_argument("--model", metavar="PATH", required=True, help="the checkpoint's folder")
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument(
        "--output", metavar="DIR", type=path_argument, help="a folder for the files; without, there is the table"
    )
    add_adapter(parser, "all items are answered with it; auto: each with that of its media; by default the one that is "
                "loaded, else auto")  # fmt: skip
    add_adapter_folder(parser)
    parser.add_argument("--normalizer", choices=NORMALIZERS, help="default: english for asr, none for the others")
    parser.add_argument("--tokenize", metavar="NAME", help="sacreBLEU's tokeniser, for ast (default: 13a)")
    parser.add_argument(
        "--reference", metavar="NAME", choices=PUBLISHED,
        help=f"show the published figures of a benchmark: {', '.join(PUBLISHED)}",
    )  # fmt: skip
    add_mesh(parser)
    add_precision(parser)
    parser.add_argument("--max-new-tokens", metavar="N", type=int, default=256, help="(default: %(default)s)")
    parser.add_argument("--slots", metavar="N", type=int, default=8, help="rows that are decoded at once")
    parser.add_argument("--cache-tokens", metavar="N", type=int, help="of all rows together; by default what fits")
    add_draft(parser)
    add_draft_tokens(parser)
    add_compilation_cache(parser)
    add_profile(parser, "some items in the middle")
    add_host_options(parser)
    return parser.parse_args()


@cli_entrypoint
def main() -> int:
    arguments = parse_arguments()
    with named_options(arguments):
        check_positive("max_new_tokens", arguments.max_new_tokens)
    if arguments.tokenize is not None and arguments.task != "ast":
        raise phi4mm_jax.InputError(f"--tokenize is for the task ast; leave it out for {arguments.task}")
    with connected_hosts(coordination_of(arguments)):
        return measure_sets(arguments)


def measure_sets(arguments: argparse.Namespace) -> int:
    """Read and check all that is asked for, then evaluate."""
    with named_options(arguments):
        sizes: dict[str, Any] = user_adapter_sizes(arguments) | {"draft_tokens": draft_tokens_of(arguments)}
        config = EngineConfig(slots=arguments.slots, cache_tokens=arguments.cache_tokens, cli=True, **sizes)
        measure = Measure(arguments.task, arguments.normalizer, arguments.tokenize or "13a")
    published = PUBLISHED[arguments.reference] if arguments.reference else None
    names = named(arguments.manifests)
    if published is not None:
        for name in names:
            published.check(name, list(measure.metrics))
    sets = {name: read_items(path) for name, path in names.items()}
    for name, path in names.items():
        measure.check(path, sets[name])
    check_profile(arguments.profile)
    keep_compiled(arguments.compilation_cache)
    with tempfile.TemporaryDirectory() as nowhere:
        return evaluate(arguments, config, measure, sets, arguments.output or Path(nowhere, "run"))


def named(manifests: Sequence[Path]) -> dict[str, Path]:
    """Return manifests by the names of their sets: the files' without the ending."""
    names = {path.stem: path for path in manifests}
    if len(names) < len(manifests):
        twice = next(p for p in manifests if names[p.stem] is not p)
        raise phi4mm_jax.InputError(f"{twice} and {names[twice.stem]}: two sets have the same name; rename one")
    return names


def evaluate(
    arguments: argparse.Namespace, config: EngineConfig, measure: Measure, sets: Mapping[str, list[Item]], folder: Path
) -> int:
    """Ask what is not answered yet, then measure."""
    items = [item for of_set in sets.values() for item in of_set]
    adapter = None if arguments.adapter == AUTO else adapter_of(arguments, use_given=True)
    adapters, users = adapter_folders_of(arguments), user_adapters_of(arguments)
    check_adapter(arguments.model, adapter if adapter in adapter_choices() else None, adapters)
    settings = settings_of(arguments.model, arguments.dtype, adapter, arguments.max_new_tokens, items, adapters)
    weights = [settings.weights, *filter(None, (arguments.adapters_from, arguments.weights))]
    weights += [f"{name}={d.replace(' ', '-')}" for name, d in (user_adapter_digests(arguments) or {}).items()]
    settings = dataclasses.replace(settings, weights=" ".join(weights))
    check_same_on_all_hosts("the items and settings", dataclasses.asdict(settings))
    if arguments.output:
        check_shared_filesystem(folder)
    share, own, own_settings = deal_out(items), folder, settings
    if jax.process_count() > 1:  # a folder each, from which the same number of hosts resumes
        own = folder / f"host-{jax.process_index()}-of-{jax.process_count()}"
        own_settings = dataclasses.replace(settings, prompts=f"{settings.prompts} {own.name}")
        if is_primary_process():
            claim_folder(folder, settings)
        check_same_on_all_hosts("the folders", "claimed")
    with answer_file(own, own_settings, share, arguments.draft) as file:
        if file.answered:
            print(f"{file.answered} of {len(share)} items are answered already; resuming", file=sys.stderr)
        if file.answered < len(share):
            engine = make_engine(load_model(arguments), config, users)
            with (
                count_bar("Answering", "tokens", len(share), file.answered) as advance,
                Profile(arguments.profile, len(share), file.answered, arguments.slots) as profile,
            ):
                for _, tokens in file.run(engine):
                    advance(1, tokens)
                    profile.advance()
    answers = [Answer(**found) for found in collect([dataclasses.asdict(a) for a in read_answers(own, share)])]
    if not is_primary_process():
        return 0
    starts = iter(answers)
    answered = {name: (of_set, [next(starts) for _ in of_set]) for name, of_set in sets.items()}
    report = measure(answered, PUBLISHED[arguments.reference] if arguments.reference else None)
    if arguments.output:
        write_report(folder, report, measure, settings, answered)
    show(table(report, measure), notes(report, answers, arguments.max_new_tokens))
    return 0


def show(made: Table, lines: Iterable[str]) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    console.print(made)
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
