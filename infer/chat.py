"""Chat with the model in a terminal: python -m infer.chat --model PATH.

What you type is said to the model, but for these:

    /image FILE    show an image with what you say next
    /audio FILE    let it hear a clip; an empty line then says nothing more
    /video FILE    show frames of a video file, or of a folder of images
    /system TEXT   the system message; none without TEXT
    /begin TEXT    how the next answer begins
    /continue      continue the last answer, as where it was cut or stopped
    /undo          take back what is attached, or else the last turn
    /reset         take back all turns
    /save FILE     the conversation, as a line for infer.batch
    /help          this text
    /quit          or Ctrl-D: the end

Ctrl-C stops an answer; what was said so far stays.
"""

import argparse
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TextIO

from phi4mm_jax import InputError
from phi4mm_jax.commands.options import (
    adapter_of,
    add_adapter,
    add_adapter_folder,
    add_draft,
    add_draft_tokens,
    add_mesh,
    add_precision,
    draft_tokens_of,
    load_model,
    make_engine,
    user_adapter_sizes,
    user_adapters_of,
)
from phi4mm_jax.engine import Completion, Engine, EngineConfig, Request, Sampling, ToolCall
from phi4mm_jax.engine.request import Draft
from phi4mm_jax.processing.audio import load_audio
from phi4mm_jax.processing.batching import Row
from phi4mm_jax.processing.images import load_image
from phi4mm_jax.processing.processor import Processor
from phi4mm_jax.processing.prompt import Tokens, placeholder_in
from phi4mm_jax.processing.sources import each
from phi4mm_jax.processing.video import MAX_FRAMES, check_frames, crops_per_frame, video_frames
from phi4mm_jax.utils.cli import cli_entrypoint, make_parser, named_options, standard_output, with_program_names
from phi4mm_jax.utils.files import writing


@dataclass(frozen=True)
class Attachment:
    """A medium, loaded once for all turns to come."""

    kind: Literal["image", "audio", "video"]
    path: str
    medium: Any


@dataclass(frozen=True)
class Turn:
    text: str
    media: tuple[Attachment, ...] = ()
    begun: str = ""  # how the answer is to begin
    answer: str | None = None  # whole
    calls: tuple[ToolCall, ...] = ()  # of tools, in the answer
    content: str = ""  # the answer without them
    tokens: tuple[int, ...] = ()  # of the answer after `begun`, without the stop token


@dataclass(frozen=True)
class Conversation:
    system: str = ""
    turns: tuple[Turn, ...] = ()
    attached: tuple[Attachment, ...] = ()  # for the next turn
    begun: str = ""  # likewise


@dataclass(frozen=True)
class Settings:
    """Settings of answers.

    Raises:
        InputError: a value out of range.
    """

    max_new_tokens: int = 1024
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    frames: int = MAX_FRAMES
    adapter: str | None = None
    draft: Draft | None = None

    def __post_init__(self):
        check_frames(self.frames)
        self.request(0, self.max_new_tokens)

    def request(self, turn: int, room: int) -> Request:
        limit = min(self.max_new_tokens, room)
        seeded = self.sampling.seed is not None  # else by the prompt, which each turn has another of
        sampling = replace(self.sampling, stream=turn) if seeded else self.sampling
        return Request(
            "", max_new_tokens=limit, sampling=sampling, stop=self.stop, adapter=self.adapter, draft=self.draft
        )


def messages_of(
    conversation: Conversation, part: Callable[[Attachment], dict[str, Any]], *, sampled: bool = False
) -> list[dict[str, Any]]:
    """Return chat messages; `part` is what stands for a medium, answers are texts or, where asked for, sampled tokens.

    An answer that is only begun is the last message."""
    messages: list[dict[str, Any]] = []
    if conversation.system:
        messages.append({"role": "system", "content": conversation.system})
    for turn in conversation.turns:
        text = {"type": "text", "text": turn.text}
        messages.append({"role": "user", "content": [*map(part, turn.media), text] if turn.media else turn.text})
        if sampled and turn.tokens:
            content = [turn.begun, Tokens(turn.tokens)] if turn.begun else Tokens(turn.tokens)
            messages.append({"role": "assistant", "content": content})
        elif turn.calls:  # with their marks as special tokens, as the model wrote them
            calls = [{"function": {"name": call.name, "arguments": call.arguments}} for call in turn.calls]
            messages.append({"role": "assistant", "content": turn.content, "tool_calls": calls})
        elif turn.answer is not None or turn.begun:
            messages.append({"role": "assistant", "content": turn.begun if turn.answer is None else turn.answer})
    return messages


def as_medium(attachment: Attachment) -> dict[str, Any]:
    return {"type": attachment.kind, attachment.kind: attachment.medium}


def as_path(attachment: Attachment) -> dict[str, Any]:
    part = {"type": attachment.kind, attachment.kind: os.path.abspath(attachment.path)}
    return part | {"frames": len(attachment.medium)} if attachment.kind == "video" else part


# Commands


def command(
    line: str, conversation: Conversation, settings: Settings, processor: Processor
) -> tuple[Conversation, str]:
    """Return what a line that begins with "/" makes of the conversation, and what to tell.

    Raises:
        InputError: no such command, or it cannot be done.
        EOFError: by /quit.
    """
    name, _, argument = line.partition(" ")
    argument = argument.strip()
    if name in ("/image", "/audio", "/video", "/save") and not argument:
        raise InputError(f"{name} needs the name of a file: {name} FILE")
    match name:
        case "/image" | "/audio" | "/video":
            attachment = attach(name[1:], os.path.expanduser(argument), settings.frames, processor)
            notice = f"{attachment.kind} attached, {tokens_of(attachment, processor)} tokens; say what to do with it"
            return replace(conversation, attached=(*conversation.attached, attachment)), notice
        case "/system":
            return replace(conversation, system=argument), "system message set" if argument else "no system message"
        case "/begin":
            notice = "the next answer begins so" if argument else "the next answer begins by itself"
            return replace(conversation, begun=argument), notice
        case "/undo" if conversation.attached:
            return replace(conversation, attached=()), "nothing is attached now"
        case "/undo" if conversation.turns:
            turns = conversation.turns[:-1]
            return replace(conversation, turns=turns), f"the last turn is taken back, {len(turns)} are left"
        case "/undo":
            raise InputError("there is no turn to take back")
        case "/reset":
            return Conversation(conversation.system), "all turns are taken back"
        case "/save":
            save(conversation, os.path.expanduser(argument))
            return conversation, f"saved as {argument}"
        case "/help":
            return conversation, with_program_names((__doc__ or "").partition("\n\n")[2].rstrip())
        case "/quit":
            raise EOFError
    raise InputError(f"there is no command {name:.80}; /help lists them (a space before it makes it text)")


def attach(kind: Any, path: str, frames: int, processor: Processor) -> Attachment:
    def load_video(source: Any) -> Any:
        return video_frames(source, frames, crop_size=processor.config.vision.crop_size)

    load = {"image": load_image, "audio": load_audio, "video": load_video}[kind]
    return Attachment(kind, path, *each(kind, [path], load))


def tokens_of(attachment: Attachment, processor: Processor) -> int:
    medium = attachment.medium
    match attachment.kind:
        case "image":
            return processor.count_image_tokens(medium)
        case "audio":
            return processor.count_audio_tokens(medium)
        case "video":
            return sum(processor.count_image_tokens(frame, crops_per_frame(len(medium))) for frame in medium)


def save(conversation: Conversation, path: str) -> None:
    text = json.dumps({"messages": messages_of(conversation, as_path)}, ensure_ascii=False, allow_nan=False) + "\n"
    with writing(Path(path)):
        try:
            with open(path, "x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            raise InputError(f"{path} exists already; choose another name") from None


# Answers


def prepare(
    conversation: Conversation, processor: Processor, engine: Engine, adapter: str | None = None
) -> tuple[Row, int]:
    """The conversation processed, and how many tokens the answer may have. An answer at its end is continued.

    Raises:
        InputError: it does not fit.
    """
    messages = messages_of(conversation, as_medium, sampled=True)
    builtin = engine.runner.user_adapters.choose(adapter).builtin
    row = processor.row(messages, continue_final_message=messages[-1]["role"] == "assistant", adapter=builtin)
    room = min(processor.context, engine.config.pages * engine.config.page_tokens)
    if len(row.tokens) >= room:
        limit = "the context is" if room == processor.context else "--cache-tokens are"
        raise InputError(f"the conversation has {len(row.tokens)} tokens; {limit} {room}, for the answer too")
    return row, room - len(row.tokens)


def answer(engine: Engine, request: Request, row: Row, out: TextIO) -> Completion:
    """Write the answer as it comes. Ctrl-C cancels it."""
    with interrupts() as pressed:
        number = engine.submit(request, row)
        while True:
            for update in engine.step():
                if update.id == number:
                    print(update.text, end="", file=out, flush=True)
                    if update.completion is not None:
                        return update.completion
            if pressed():
                engine.cancel(number)


@contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Yield what tells whether Ctrl-C was pressed: raised within a step, it would leave the engine without its cache.

    The second time it ends the program, since the step may be a long compilation.
    """
    pressed = False

    def note(*_: Any) -> None:
        nonlocal pressed
        if pressed:
            raise SystemExit(130)
        pressed = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


# The program


def converse(
    processor: Processor, engine: Engine, conversation: Conversation, settings: Settings,
    read: Callable[[], str], out: TextIO, tell: Callable[[str], None],
) -> Conversation:  # fmt: skip
    """Take lines until there are no more. Whatever goes wrong with one is told in a line, and changes nothing.

    Args:
        read: gives the next line; raises EOFError at the end, and KeyboardInterrupt as `input` does.
        out: where answers go.
        tell: is given all else that there is to say.
    """
    while True:
        try:
            line = read()
            if line.strip() == "/continue":
                conversation = continue_turn(conversation, settings, processor, engine, out, tell)
            elif line.startswith("/"):
                conversation, notice = command(line.strip(), conversation, settings, processor)
                tell(notice)
            elif line.strip() or conversation.attached:
                conversation = take_turn(line.strip(), conversation, settings, processor, engine, out, tell)
        except InputError as error:
            tell(f"error: {error}")
        except KeyboardInterrupt:
            tell("interrupted; /quit or Ctrl-D ends")
        except EOFError:
            return conversation


def take_turn(
    text: str, conversation: Conversation, settings: Settings, processor: Processor, engine: Engine,
    out: TextIO, tell: Callable[[str], None],
) -> Conversation:  # fmt: skip
    if (found := placeholder_in(text)) is not None:
        raise InputError(f"{found} would be text: /image FILE, /audio FILE or /video FILE attach what comes before it")
    turn = Turn(text, conversation.attached, conversation.begun)
    asked = replace(conversation, turns=(*conversation.turns, turn), attached=(), begun="")
    return complete(asked, settings, processor, engine, out, tell)


def continue_turn(
    conversation: Conversation, settings: Settings, processor: Processor, engine: Engine,
    out: TextIO, tell: Callable[[str], None],
) -> Conversation:  # fmt: skip
    if not conversation.turns or not conversation.turns[-1].answer:
        raise InputError("there is no answer to continue; /begin TEXT tells how the next one begins")
    if conversation.turns[-1].calls:
        raise InputError("the last answer ends with tool calls, which are not continued; /undo takes it back")
    return complete(conversation, settings, processor, engine, out, tell)


def complete(
    asked: Conversation, settings: Settings, processor: Processor, engine: Engine,
    out: TextIO, tell: Callable[[str], None],
) -> Conversation:  # fmt: skip
    """Answer the last turn, or continue its answer."""
    *before, turn = asked.turns
    try:
        row, room = prepare(asked, processor, engine, settings.adapter)
    except InputError as error:
        raise InputError(
            f"{error}. Nothing was said; /undo takes back what is attached or came before, /reset all"
        ) from error
    if turn.answer is None:
        print(turn.begun, end="", file=out, flush=True)
    completion = answer(engine, settings.request(len(before), room), row, out)
    print(file=out, flush=True)
    completion.raise_for_error()
    tell(f"[{completion.prompt_tokens} tokens in, {len(completion.tokens)} out, ended by {completion.finish_reason}]")
    sampled: tuple[int, ...] | None = tuple(completion.tokens)
    if completion.finish_reason == "stop":  # by a token, or by a text, which the tokens would have in them
        sampled = sampled[:-1] if sampled[-1] in processor.config.stop_token_ids else None
    so_far, content = (turn.begun, turn.begun) if turn.answer is None else (turn.answer, turn.content)
    whole = replace(
        turn, begun=turn.begun if turn.answer is None or turn.tokens else turn.answer,
        answer=so_far + completion.text, calls=completion.tool_calls, content=content + completion.content,
        tokens=() if sampled is None else (*turn.tokens, *sampled),
    )  # fmt: skip
    return replace(asked, turns=(*before, whole))


def parse_arguments() -> argparse.Namespace:
    parser = make_parser("infer.chat", __doc__)
    parser.add_argument("--model", metavar="PATH", required=True, help="the checkpoint's folder")
    parser.add_argument("--system", metavar="TEXT", default="", help="a system message")
    add_adapter(parser, "by default the one that is loaded, else that of the media")
    add_adapter_folder(parser)
    add_draft(parser)
    add_draft_tokens(parser)
    add_mesh(parser)
    add_precision(parser)
    parser.add_argument("--cache-tokens", metavar="N", type=int, help="how long it may get; by default what fits")
    parser.add_argument("--frames", metavar="N", type=int, default=MAX_FRAMES, help="of a video, at most")
    parser.add_argument("--max-new-tokens", metavar="N", type=int, default=1024, help="of an answer")
    parser.add_argument("--temperature", metavar="X", type=float, default=0.0, help="0, the default, is greedy")
    parser.add_argument("--top-k", metavar="N", type=int, default=0)
    parser.add_argument("--top-p", metavar="X", type=float, default=1.0)
    parser.add_argument("--seed", metavar="N", type=int, help="of sampling; by default it follows from the prompt")
    parser.add_argument("--stop", metavar="TEXT", action="append", default=[], help="may be given several times")
    return parser.parse_args()


@cli_entrypoint
def main() -> int:
    arguments = parse_arguments()
    with named_options(arguments):
        sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p, seed=arguments.seed)
        stop = tuple(arguments.stop)
        adapter = adapter_of(arguments, use_given=True)
        settings = Settings(arguments.max_new_tokens, sampling, stop, arguments.frames, adapter, arguments.draft)
        sizes: dict[str, Any] = user_adapter_sizes(arguments) | {"draft_tokens": draft_tokens_of(arguments)}
        config = EngineConfig(slots=1, cache_tokens=arguments.cache_tokens, cli=True, **sizes)
    model = load_model(arguments, notice=True)
    engine = make_engine(model, config, user_adapters_of(arguments))
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    prompt = "> " if sys.stdin.isatty() else ""
    tell("/help lists the commands. The first answers take longer: their programs have to be compiled.")
    with standard_output("answer") as out:
        converse(model.processor, engine, Conversation(arguments.system), settings, lambda: input(prompt), out, tell)
    return 0


def tell(text: str) -> None:
    print(text, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
