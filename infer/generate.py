"""Answer one prompt: python -m infer.generate --model PATH [--image FILE]... [--audio FILE]... "TEXT".

With --beams the likeliest answers come one after the other, the likeliest first, each with its score.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import phi4mm_jax
from phi4mm_jax.commands.options import (
    adapter_of,
    add_adapter,
    add_adapter_folder,
    add_draft,
    add_mesh,
    add_precision,
    draft_tokens_of,
    load_model,
    make_engine,
    user_adapter_sizes,
    user_adapters_of,
)
from phi4mm_jax.engine import EngineConfig, Grammar, Request, Sampling
from phi4mm_jax.processing.audio import load_audio
from phi4mm_jax.processing.images import load_image
from phi4mm_jax.processing.prompt import check_raw, given_media, placeholder_in
from phi4mm_jax.processing.sources import each
from phi4mm_jax.processing.video import MAX_FRAMES, check_frames, video_frames
from phi4mm_jax.utils.checks import is_unicode
from phi4mm_jax.utils.cli import cli_entrypoint, make_parser, named_options, standard_output
from phi4mm_jax.utils.paths import path_argument
from phi4mm_jax.utils.profiling import Profile, add_profile, check_profile
from phi4mm_jax.utils.progress import progress_bar


def parse_arguments() -> argparse.Namespace:
    parser = make_parser("infer.generate", "Answer one prompt.")
    parser.add_argument("text", metavar="TEXT", help="what to ask; media are put before it, in the order given")
    parser.add_argument("--model", metavar="PATH", required=True, help="the checkpoint's folder")
    parser.add_argument("--image", metavar="FILE", action="append", default=[], help="may be given several times")
    parser.add_argument("--audio", metavar="FILE", action="append", default=[], help="may be given several times")
    parser.add_argument("--video", metavar="FILE", action="append", default=[], help="or a folder of images")
    parser.add_argument("--frames", metavar="N", type=int, default=MAX_FRAMES, help="of a video, at most")
    parser.add_argument("--system", metavar="TEXT", help="a system message")
    parser.add_argument("--raw", action="store_true", help="TEXT is a whole prompt with placeholders, no chat message")
    add_mesh(parser)
    add_precision(parser)
    parser.add_argument("--max-new-tokens", metavar="N", type=int, default=256, help="(default: %(default)s)")
    parser.add_argument("--temperature", metavar="X", type=float, default=0.0, help="0, the default, is greedy")
    parser.add_argument("--top-k", metavar="N", type=int, default=0)
    parser.add_argument("--top-p", metavar="X", type=float, default=1.0)
    parser.add_argument("--min-p", metavar="X", type=float, default=0.0)
    parser.add_argument("--repetition-penalty", metavar="X", type=float, default=1.0)
    parser.add_argument("--beams", metavar="N", type=int, default=1, help="answers to search for")
    add_adapter(parser, "by default the one that is loaded, else that of the media")
    add_adapter_folder(parser)
    add_draft(parser)
    parser.add_argument("--seed", metavar="N", type=int, help="of sampling; by default it follows from the prompt")
    parser.add_argument("--stop", metavar="TEXT", action="append", default=[], help="may be given several times")
    parser.add_argument("--json-schema", metavar="FILE", type=path_argument, help="a JSON schema that the answer obeys")
    parser.add_argument("--regex", metavar="PATTERN", help="a regular expression that the whole answer matches")
    add_profile(parser, "the answer, once more after what compiles has been compiled,")
    return parser.parse_args()


def check(arguments: argparse.Namespace) -> None:
    """Raise an InputError for what is wrong whatever the checkpoint: reading that takes minutes."""
    with named_options(arguments):
        stop = arguments.stop if arguments.beams > 1 else ()
        Request(
            "", max_new_tokens=arguments.max_new_tokens, sampling=sampling_of(arguments), beams=arguments.beams,
            stop=stop, grammar=grammar_of(arguments),
        )  # fmt: skip
        check_frames(arguments.frames)
    adapter_of(arguments, use_given=True)
    user_adapter_sizes(arguments)
    if arguments.raw and arguments.video:
        raise phi4mm_jax.InputError("--video does not go with --raw; give its frames as --image")
    if arguments.raw and arguments.system is not None:
        raise phi4mm_jax.InputError("--system does not go with --raw; write the system message into TEXT")
    if "" in arguments.stop:
        raise phi4mm_jax.InputError("--stop is empty; leave it out, or give a text")
    texts = [("TEXT", arguments.text), ("--system", arguments.system or ""), *(("--stop", s) for s in arguments.stop)]
    for name, text in texts:
        if not is_unicode(text):
            raise phi4mm_jax.InputError(f"{name} is {text!r:.200}, which is not UTF-8")
    for name, text in texts[:2]:
        if not arguments.raw and (found := placeholder_in(text)) is not None:
            raise phi4mm_jax.InputError(
                f"{name} has {found}, which would be text: the media of --image, --audio and --video are put before "
                "TEXT; leave it out, or give --raw and a whole prompt"
            )
    if not (arguments.raw or arguments.text.strip() or arguments.image or arguments.audio or arguments.video):
        raise phi4mm_jax.InputError("TEXT is empty, and there is no medium; ask something, or give --image or --audio")
    if arguments.raw:
        check_raw(arguments.text, {"image": len(arguments.image), "audio": len(arguments.audio)})
    each("image", given_media("image", arguments.image), load_image)
    each("audio", given_media("audio", arguments.audio), load_audio)
    each("video", arguments.video, lambda source: video_frames(source, arguments.frames))
    check_profile(arguments.profile)


def sampling_of(arguments: argparse.Namespace) -> Sampling:
    return Sampling(
        arguments.temperature, arguments.top_k, arguments.top_p, arguments.min_p, arguments.repetition_penalty,
        arguments.seed,
    )  # fmt: skip


def grammar_of(arguments: argparse.Namespace) -> Grammar | None:
    """Return what --json-schema or --regex says that the answer obeys.

    Raises:
        InputError: both are given, the file cannot be read, or it is not valid.
    """
    path, pattern = arguments.json_schema, arguments.regex
    if path is not None and pattern is not None:
        raise phi4mm_jax.InputError("--json-schema and --regex are both given; leave one out")
    try:
        if path is not None:
            return Grammar.json_schema(path.read_text(encoding="utf-8"))
        return None if pattern is None else Grammar.regex(pattern)
    except OSError as error:
        raise phi4mm_jax.InputError(f"--json-schema: {path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise phi4mm_jax.InputError(f"--json-schema: {path}: is not UTF-8 (at byte {error.start})") from error
    except phi4mm_jax.InputError as error:
        option = "--regex" if path is None else f"--json-schema: {path}"
        raise phi4mm_jax.InputError(f"{option}: {error}") from error


def prompt_of(arguments: argparse.Namespace) -> str | list[dict]:
    """The raw prompt, or a conversation of one turn with the media before the text."""
    if arguments.raw:
        return arguments.text
    media = [{"type": "image", "image": path} for path in arguments.image]
    media += [{"type": "audio", "audio": path} for path in arguments.audio]
    media += [{"type": "video", "video": path, "frames": arguments.frames} for path in arguments.video]
    system = [{"role": "system", "content": arguments.system}] if arguments.system else []
    return [*system, {"role": "user", "content": [*media, {"type": "text", "text": arguments.text}]}]


def answer(arguments: argparse.Namespace, model: phi4mm_jax.Model) -> phi4mm_jax.Completion:
    if arguments.user_adapter:
        return answer_with_user_adapter(arguments, model)
    (completion,) = model.generate(
        [prompt_of(arguments)],
        images=[arguments.image] if arguments.raw else None,
        audios=[arguments.audio] if arguments.raw else None,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        repetition_penalty=arguments.repetition_penalty,
        beams=arguments.beams,
        adapter=arguments.adapter,
        seed=arguments.seed,
        stop=arguments.stop,
        grammar=grammar_of(arguments),
        draft=arguments.draft,
    )
    return completion


def answer_with_user_adapter(arguments: argparse.Namespace, model: phi4mm_jax.Model) -> phi4mm_jax.Completion:
    """Answer by an engine that has loaded users' adapters, of which `Model.generate` knows none."""
    config = EngineConfig(
        slots=1, beams=arguments.beams, draft_tokens=draft_tokens_of(arguments), cli=True,
        **user_adapter_sizes(arguments),
    )  # fmt: skip
    request = Request(
        prompt_of(arguments), images=arguments.image if arguments.raw else (),
        audios=arguments.audio if arguments.raw else (), max_new_tokens=arguments.max_new_tokens,
        sampling=sampling_of(arguments), stop=arguments.stop, beams=arguments.beams,
        adapter=adapter_of(arguments, use_given=True), grammar=grammar_of(arguments), draft=arguments.draft,
    )  # fmt: skip
    ((_, completion),) = make_engine(model, config, user_adapters_of(arguments)).run([request])
    completion.raise_for_error()
    return completion


@contextmanager
def only_prompt() -> Iterator[None]:
    """Take the number out of errors about the prompt, as there is one."""
    try:
        yield
    except phi4mm_jax.InputError as error:
        message = re.sub("^prompt 0 ", "the prompt ", str(error)).removeprefix("prompt 0: ")
        raise type(error)(message) from error


@cli_entrypoint
def main() -> int:
    arguments = parse_arguments()
    check(arguments)
    model = load_model(arguments, notice=True)
    with progress_bar("Compiling and generating"), named_options(arguments), only_prompt():
        completion = answer(arguments, model)
        if arguments.profile is not None:
            with Profile(arguments.profile):
                answer(arguments, model)
    with standard_output("answer") as out:
        for found in completion.alternatives:
            print(f"[{found.score:.4f}] {found.text}", file=out)
        if not completion.alternatives:
            print(completion.text, file=out)
    print(
        f"[{completion.prompt_tokens} tokens in, {len(completion.tokens)} out, ended by {completion.finish_reason}]",
        file=sys.stderr,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
