"""Drop samples from a manifest that should not be trained on.

    python -m train.prepare decontaminate --input M.jsonl --against eval.jsonl ... --output OUT.jsonl [--ngram 13]
    python -m train.prepare filter-speech --input M.jsonl --hypotheses H.jsonl --max-wer 0.1 --output OUT.jsonl

The first drops samples that share an n-gram with evaluation texts. The second keeps speech, such as synthetic speech,
that a recogniser understands: H.jsonl has its transcriptions, for instance the output of infer.batch. Dropped samples
go to OUT.dropped.jsonl. An output is written whole or not at all.
"""

import argparse
import sys

from phi4mm_jax.data.filters import decontaminate, dropped_path, filter_speech
from phi4mm_jax.utils.cli import cli_entrypoint, make_parser, named_options
from phi4mm_jax.utils.paths import path_argument


def parse_arguments() -> argparse.Namespace:
    parser = make_parser("train.prepare", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    clean = commands.add_parser("decontaminate", help="drop samples that share texts with evaluations")
    speech = commands.add_parser("filter-speech", help="keep speech that a recogniser understands")
    for command in (clean, speech):
        command.add_argument("--input", metavar="FILE", type=path_argument, required=True)
        command.add_argument("--output", metavar="FILE", type=path_argument, required=True)
    clean.add_argument(
        "--against", metavar="FILE", type=path_argument, nargs="+", required=True, help="evaluation samples"
    )
    clean.add_argument("--ngram", metavar="N", type=int, default=13, help="words in a row that must not be shared")
    speech.add_argument(
        "--hypotheses", metavar="FILE", type=path_argument, required=True, help="what a recogniser heard"
    )
    speech.add_argument("--max-wer", metavar="RATE", type=float, required=True, help="the largest word error rate")
    return parser.parse_args()


@cli_entrypoint
def main() -> int:
    arguments = parse_arguments()
    with named_options(arguments):
        if arguments.command == "decontaminate":
            outcome = decontaminate(arguments.input, arguments.against, arguments.output, arguments.ngram)
        else:
            outcome = filter_speech(arguments.input, arguments.hypotheses, arguments.max_wer, arguments.output)
    for note in outcome.notes:
        print(note, file=sys.stderr)
    print(f"{arguments.output}: {outcome.kept} kept; {dropped_path(arguments.output)}: {outcome.dropped} dropped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
