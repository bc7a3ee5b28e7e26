"""Write down what is said in recordings of any length: python -m infer.transcribe --model PATH FILE...

A recording is cut at silence into clips of at most --clip-seconds; no sample is lost or heard twice. The clips are rows
of one batch, of several recordings at a time; those without speech are left out. A segment of the output is a clip,
from the beginning of speech in it to its end: with a shorter --pause or --clip-seconds they are shorter.

With --output FOLDER each recording has a file there for each --format, named as the recording; without it the one
recording goes to standard output. Rerun the same command to resume a run that was stopped: what is there is kept,
unless its recording is newer; transcripts of another model or other settings in FOLDER, of whatever recordings, are
an error (its transcripts.settings.json tells them). A recording that cannot be transcribed stops no other; the exit
status is then 1.

json has the keys of OpenAI's verbose_json: segments with start, end, text, tokens and avg_logprob.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from phi4mm_jax import InputError
from phi4mm_jax.adapters import ADAPTERS
from phi4mm_jax.commands.options import (
    adapter_folders_of,
    adapter_of,
    add_adapter,
    add_adapter_folder,
    add_compilation_cache,
    add_mesh,
    add_precision,
    load_model,
    make_engine,
    user_adapter_digests,
    user_adapter_sizes,
    user_adapters_of,
)
from phi4mm_jax.engine import Engine, EngineConfig, Request, Sampling
from phi4mm_jax.engine.provenance import check_settings, settings_of, settings_path
from phi4mm_jax.processing.audio import announced_seconds
from phi4mm_jax.processing.recordings import CutSettings, RecordedClip, check_detector
from phi4mm_jax.transcription.recognition import Transcript, clip_request, transcribe
from phi4mm_jax.transcription.transcripts import LANGUAGES, TASKS, Task, plain_text, srt, verbose, vtt
from phi4mm_jax.utils.cli import cli_entrypoint, make_parser, named_options, standard_output
from phi4mm_jax.utils.compilation import keep_compiled
from phi4mm_jax.utils.files import make_folder, write_atomically, writing
from phi4mm_jax.utils.paths import path_argument
from phi4mm_jax.utils.progress import clock, seconds_bar
from phi4mm_jax.utils.strict_json import strict_json

FORMATS = ("txt", "srt", "vtt", "json")
_TRANSCRIPTS = "transcripts"  # what the file of their settings is named after


@dataclass(frozen=True)
class Job:
    """A recording and the files that its transcript goes to, by format; none for standard output."""

    source: Path
    outputs: dict[str, Path]


def parse_arguments() -> argparse.Namespace:
    cut = CutSettings()
    parser = make_parser("infer.transcribe", __doc__)
    parser.add_argument("files", metavar="FILE", type=path_argument, nargs="+", help="WAV, FLAC, Ogg, MP3, M4A, ...")
    parser.add_argument("--model", metavar="PATH", required=True, help="the checkpoint's folder")
    parser.add_argument("--output", metavar="FOLDER", type=path_argument, help="by default standard output")
    parser.add_argument(
        "--format", choices=FORMATS, action="append", default=[], help="may be given several times (default: txt)"
    )
    parser.add_argument("--language", choices=tuple(LANGUAGES), help="what json names; the model finds out itself")
    parser.add_argument("--translate-to", choices=tuple(LANGUAGES), help="translate what is said to this language")
    parser.add_argument(
        "--prompt", metavar="TEXT", help=f"what the model is asked to do with a clip (default: {TASKS['transcribe']!r})"
    )
    parser.add_argument(
        "--clip-seconds", metavar="X", type=float, default=cut.clip_seconds, help="at most (default: %(default)g)"
    )
    parser.add_argument(
        "--pause", metavar="X", type=float, default=cut.pause,
        help="seconds of silence that end a clip in any case (default: %(default)g)",
    )  # fmt: skip
    parser.add_argument(
        "--max-new-tokens", metavar="N", type=int, default=512, help="of a clip's transcript (default: %(default)s)"
    )
    add_mesh(parser)
    add_precision(parser)
    parser.add_argument("--slots", metavar="N", type=int, default=8, help="clips that are decoded at once")
    parser.add_argument("--cache-tokens", metavar="N", type=int, help="of all clips together; by default what fits")
    parser.add_argument("--cache-dtype", choices=("int8",), help="by default the model's")
    parser.add_argument("--merge", choices=tuple(ADAPTERS), help="add this adapter to the weights: speech is faster")
    add_adapter(parser, "by default the one that is loaded, else speech")
    add_adapter_folder(parser)
    add_compilation_cache(parser)
    return parser.parse_args()


def task_of(arguments: argparse.Namespace) -> tuple[Task, str]:
    """Return what is made of a recording, and the instruction to the model."""
    target = arguments.translate_to
    if target is None:
        return "transcribe", TASKS["transcribe"] if arguments.prompt is None else arguments.prompt
    if arguments.prompt is not None:
        raise InputError("--prompt does not go with --translate-to, which asks by words of its own; give one of them")
    return "translate", f"Translate the audio to {LANGUAGES[target].capitalize()}."


def jobs_of(files: Sequence[Path], output: Path | None, formats: Sequence[str]) -> list[Job]:
    """Return the recordings and their outputs.

    Raises:
        InputError: two recordings have the same output, or one is its own.
    """
    if output is None:
        if len(files) > 1 or len(formats) > 1:
            raise InputError("standard output takes one FILE in one --format; give --output FOLDER for several")
        return [Job(files[0], {})]
    jobs = [Job(file, {form: output / f"{file.stem}.{form}" for form in formats}) for file in files]
    owners: dict[Path, Path] = {}
    for job in jobs:
        for path in job.outputs.values():
            if (other := owners.setdefault(path, job.source)) is not job.source:
                raise InputError(f"{other} and {job.source} would both be written to {path}; rename one, or run twice")
            if path.exists() and job.source.exists() and path.samefile(job.source):
                raise InputError(
                    f"{path}: is a recording, which its own transcript would replace; give another --output"
                )
    return jobs


def is_done(job: Job) -> bool:
    """Return whether a recording's transcripts are there; says so, and where they are older than it."""
    paths = list(job.outputs.values())
    if not paths or not all(path.exists() for path in paths):
        return False
    names = ", ".join(map(str, paths))
    if job.source.exists() and os.stat(job.source).st_mtime > min(os.stat(path).st_mtime for path in paths):
        print(f"{job.source} is newer than {names}; transcribing it again", file=sys.stderr)
        return False
    print(f"{job.source} is transcribed already, in {names}; delete that to have it transcribed again", file=sys.stderr)
    return True


def prepare(arguments: argparse.Namespace, jobs: Sequence[Job], instruction: str) -> None:
    """Make the output's folder; check that all transcripts in it are of these settings.

    Raises:
        InputError: it is not, or cannot be written to.
    """
    names = "dtype", "merge", "cache_dtype", "max_new_tokens", "adapters_from", "language", "clip_seconds", "pause"
    settings = settings_of(
        arguments.model, adapter_folders_of(arguments), quantized=arguments.weights, prompt=instruction,
        adapter=adapter_of(arguments, use_given=True), user_adapters=user_adapter_digests(arguments),
        **{name: getattr(arguments, name) for name in names},
    )  # fmt: skip
    with writing(arguments.output):
        make_folder(arguments.output)
        asked_before = any(path.exists() for job in jobs for path in job.outputs.values())
        has_answers = asked_before or has_transcripts(arguments.output)
        check_settings(arguments.output / _TRANSCRIPTS, settings, has_answers=has_answers)


def has_transcripts(folder: Path) -> bool:
    """Return whether a folder with settings may have transcripts of them, of whatever recordings."""
    settings = settings_path(folder / _TRANSCRIPTS)
    others = (path for path in folder.iterdir() if path != settings)
    return settings.exists() and any(path.suffix[1:] in FORMATS for path in others)


def rendered(form: str, found: Transcript, task: Task, language: str | None) -> str:
    """Return a transcript in a format."""
    match form:
        case "srt":
            return srt(found.segments)
        case "vtt":
            return vtt(found.segments)
        case "json":
            name = None if language is None else LANGUAGES[language]
            values = verbose(found.segments, task=task, language=name, seconds=found.seconds, temperature=0.0)
            return strict_json(values) + "\n"
    return plain_text(found.segments)


def write(job: Job, texts: dict[str, str]) -> None:
    """Write a transcript's files, or to standard output.

    Raises:
        InputError: one cannot be written.
    """
    for form, path in job.outputs.items():
        with writing(path):
            write_atomically(path, texts[form])
    if not job.outputs:
        with standard_output("transcript") as out:
            out.write("".join(texts.values()))


@cli_entrypoint
def main() -> int:
    arguments = parse_arguments()
    task, instruction = task_of(arguments)
    formats = list(dict.fromkeys(arguments.format or ["txt"]))
    jobs = jobs_of(list(dict.fromkeys(arguments.files)), arguments.output, formats)
    with named_options(arguments):
        cut = CutSettings(arguments.clip_seconds, arguments.pause)
        Request("", max_new_tokens=arguments.max_new_tokens)
        config = EngineConfig(
            slots=arguments.slots, cache_tokens=arguments.cache_tokens, cache_dtype=arguments.cache_dtype, cli=True,
            **user_adapter_sizes(arguments),
        )  # fmt: skip
        adapter = adapter_of(arguments, use_given=True)
    check_detector()
    if arguments.output is not None:
        prepare(arguments, jobs, instruction)
    left = [job for job in jobs if not is_done(job)]
    errors = 0
    if left:
        keep_compiled(arguments.compilation_cache)
        model = load_model(arguments, notice=True, merge=arguments.merge)
        engine = make_engine(model, config, user_adapters_of(arguments))
        errors = run(arguments, engine, left, formats, cut, (task, instruction), adapter)
    if arguments.output is not None:
        print(f"{arguments.output}: {len(jobs) - errors} of {len(jobs)} recordings are transcribed", file=sys.stderr)
    return 1 if errors else 0


def run(
    arguments: argparse.Namespace, engine: Engine, jobs: Sequence[Job], formats: Sequence[str], cut: CutSettings,
    asked: tuple[Task, str], adapter: str | None = None,
) -> int:  # fmt: skip
    """Transcribe recordings and write each as it comes to its end; return how many failed."""
    task, instruction = asked

    def request(clip: RecordedClip) -> Request:
        limit = arguments.max_new_tokens
        return clip_request(clip, instruction, max_new_tokens=limit, sampling=Sampling(), adapter=adapter)

    lengths = [announced_seconds(job.source) for job in jobs]
    total = sum(known) if len(known := [x for x in lengths if x is not None]) == len(lengths) else None
    errors, printed = 0, None
    with seconds_bar("Transcribing", total) as advance:
        for place, found in transcribe(engine, [job.source for job in jobs], request, cut, advance):
            job = jobs[place]
            if isinstance(found, Exception):
                errors += 1
                print(f"error: {job.source}: {found}", file=sys.stderr)
                continue
            for segment in found.segments:
                if segment.cut_off:
                    print(f"{job.source}: what is said at {clock(segment.start)} is cut off by --max-new-tokens "
                          f"{arguments.max_new_tokens}", file=sys.stderr)  # fmt: skip
            texts = {form: rendered(form, found, task, arguments.language) for form in formats}
            if job.outputs:
                write(job, texts)
            else:
                printed = job, texts  # when the bar is gone
    if printed is not None:
        write(*printed)
    return errors


if __name__ == "__main__":
    sys.exit(main())
