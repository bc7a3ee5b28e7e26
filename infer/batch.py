"""Answer a file of prompts: python -m infer.batch --model PATH --input prompts.jsonl --output answers.jsonl.

Each line of the input is an object:

    {"id": "a1", "prompt": "<|user|><|image_1|>What is this?<|end|><|assistant|>", "images": ["a.png"], "audios": [],
     "max_new_tokens": 64, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0,
     "seed": 0, "stop": [], "stop_tokens": [], "max_crops": 36, "beams": 1, "length_penalty": 1.0, "adapter": "vision",
     "logprobs": false, "grammar": {"json_schema": {"type": "object"}}, "draft": "lookup",
     "skip_special_tokens": false}

"messages" (chat messages as in the OpenAI API) may stand in place of "prompt"; all else but the prompt may be left out.
Without "id", a line's id is its number, from 0; without "seed", it is sampled by its id, whatever stands beside it;
without "adapter" ("none", "vision", "speech" or one that --adapter loads), it has that of its media. The answer obeys
its "grammar", which has one of "json_schema", "regex", "choice" (a list of answers) and "lark" (extra grammar).
"draft", which needs --draft or --draft-tokens, makes copies faster, and changes no answer. "skip_special_tokens" leaves
them out of the text.
Paths are relative to the input file; media may be `data:` URLs. Each line of the output has the id and the
text, tokens, finish_reason and prompt_tokens, or the id and "error"; with logprobs those of the tokens; "tool_calls"
where it calls functions, each with its name and arguments; with beams also the "alternatives", best first, each with
its text, tokens and score. "request" tells requests apart, so that no answer is taken for that of a line which has
changed. A line that is not JSON has no id; its answer has its "line".

Lines of OpenAI's batch files ("custom_id" and "body", as for /v1/chat/completions) are taken as well; without
"temperature" they are greedy, as all lines are. Their "model" may name what --adapter loads, or "adapter" any; other
models' names change nothing. With --format openai all answers have the form of OpenAI's output
files.

Rerun the same command to resume a run that was stopped. What has been answered is not answered again, and what failed
is: repair its line or its media before, if they are at fault. Another model, setting or medium than that of answers
which are there is an error; OUTPUT.settings.json, beside the output, has what they depend on. The exit status is 1 if
a line has failed. infer.ray answers on many chips and hosts.
"""

import argparse
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import get_args

import phi4mm_jax
from phi4mm_jax.adapters import ADAPTERS
from phi4mm_jax.commands.options import (
    adapter_of,
    add_adapter,
    add_adapter_folder,
    add_compilation_cache,
    add_draft,
    add_draft_tokens,
    add_mesh,
    add_precision,
    answer_settings,
    draft_tokens_of,
    load_model,
    make_engine,
    user_adapter_sizes,
    user_adapters_of,
)
from phi4mm_jax.engine import EngineConfig
from phi4mm_jax.engine.answer_file import AnswerFile
from phi4mm_jax.engine.answer_lines import Format, cut_line
from phi4mm_jax.engine.jsonl import read_requests
from phi4mm_jax.utils.checks import check_positive
from phi4mm_jax.utils.cli import cli_entrypoint, make_parser, named_options
from phi4mm_jax.utils.compilation import keep_compiled
from phi4mm_jax.utils.paths import path_argument
from phi4mm_jax.utils.profiling import Profile, add_profile, check_profile
from phi4mm_jax.utils.progress import count_bar, progress_bar


def parse_arguments() -> argparse.Namespace:
    parser = make_parser("infer.batch", __doc__)
    parser.add_argument("--model", metavar="PATH", required=True, help="the checkpoint's folder")
    parser.add_argument("--input", metavar="FILE", type=path_argument, required=True)
    parser.add_argument("--output", metavar="FILE", type=path_argument, required=True)
    add_mesh(parser)
    add_precision(parser)
    parser.add_argument(
        "--max-new-tokens", metavar="N", type=int, default=256, help="for lines that do not say (default: %(default)s)"
    )
    parser.add_argument("--slots", metavar="N", type=int, default=8, help="rows that are decoded at once")
    parser.add_argument("--cache-tokens", metavar="N", type=int, help="of all rows together; by default what fits")
    parser.add_argument("--beams", metavar="N", type=int, default=1, help="the most that a line may ask for")
    parser.add_argument(
        "--merge", choices=tuple(ADAPTERS), help="add this adapter to the weights: for lines that all need it"
    )
    add_adapter(parser, "NAME alone is for lines that do not say; by default that of a line's media")
    add_adapter_folder(parser)
    add_draft(parser)
    add_draft_tokens(parser)
    parser.add_argument("--cache-dtype", choices=("int8",), help="by default the model's")
    parser.add_argument("--ordered", action="store_true", help="answers in the order of the input")
    parser.add_argument(
        "--format", choices=get_args(Format), default="plain", help="of the answers (default: %(default)s)"
    )
    parser.add_argument("--hosts", "--host", dest="hosts", help=argparse.SUPPRESS)  # of earlier versions
    parser.add_argument("--warmup", action="store_true", help="compile every program before answering")
    add_compilation_cache(parser)
    add_profile(parser, "some lines in the middle")
    return parser.parse_args()


@cli_entrypoint
def main() -> int:
    arguments = parse_arguments()
    if arguments.hosts is not None:
        raise phi4mm_jax.InputError(
            "--hosts and --host are gone: python -m infer.ray answers on many hosts, without shares of lines"
        )
    with named_options(arguments):
        check_positive("max_new_tokens", arguments.max_new_tokens)
    adapter = adapter_of(arguments)
    check_is_one_file(arguments.input)
    lines = read_requests(
        arguments.input, max_new_tokens=arguments.max_new_tokens, adapters=user_adapters_of(arguments),
        adapter=adapter, draft=arguments.draft,
    )  # fmt: skip
    with named_options(arguments):
        config = EngineConfig(
            slots=arguments.slots, cache_tokens=arguments.cache_tokens, cache_dtype=arguments.cache_dtype,
            beams=arguments.beams, draft_tokens=draft_tokens_of(arguments), cli=True, **user_adapter_sizes(arguments),
        )  # fmt: skip
    with suppress(OSError):  # it is not there yet, or cannot be, as will be said where it is opened
        if arguments.output.samefile(arguments.input):
            raise phi4mm_jax.InputError(f"{arguments.output}: is the input; give the output another name")
    check_profile(arguments.profile)
    keep_compiled(arguments.compilation_cache)
    with AnswerFile(
        arguments.output,
        lines,
        ordered=arguments.ordered,
        settings=partial(answer_settings, arguments),
        form=arguments.format,
    ) as answers:
        if answers.answered:
            print(f"{answers.answered} of {len(lines)} lines are answered already; resuming", file=sys.stderr)
        if answers.answered < len(lines):
            answer(arguments, config, answers, len(lines))
    print(f"{arguments.output}: {answers.answered} answers, {answers.errors} of them errors", file=sys.stderr)
    if answers.cut:
        print(cut_line(answers.cut, arguments.max_new_tokens), file=sys.stderr)
    return 1 if answers.errors else 0


def check_is_one_file(path: Path) -> None:
    """Raise an InputError for a folder or a glob, which another program takes."""
    is_folder = path.is_dir()
    if is_folder or (set(path.name) & set("*?[") and not path.exists()):
        cause = "Is a directory" if is_folder else "No such file or directory"
        raise phi4mm_jax.InputError(
            f"{path}: cannot be read ({cause}); give one file, or use python -m infer.ray, which "
            "takes folders and globs"
        )


def answer(arguments: argparse.Namespace, config: EngineConfig, answers: AnswerFile, lines: int) -> None:
    model = load_model(arguments, merge=arguments.merge)
    engine = make_engine(model, config, user_adapters_of(arguments))
    if arguments.warmup:
        with progress_bar("Compiling") as advance:
            engine.warm_up(advance)
    with (
        count_bar("Answering", "tokens", lines, answers.answered) as advance,
        Profile(arguments.profile, lines, answers.answered, arguments.slots) as profile,
    ):
        for _, tokens in answers.run(engine):
            advance(1, tokens)
            profile.advance()


if __name__ == "__main__":
    sys.exit(main())
