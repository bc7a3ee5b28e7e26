"""infer.chat: the conversation in a terminal."""

import io
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.paths import TINY
from PIL import Image

from infer import chat
from infer.chat import Conversation, Settings, Turn, converse, prepare
from phi4mm_jax import InputError
from phi4mm_jax.engine import EngineConfig, Request, Sampling
from phi4mm_jax.processing.processor import Processor
from phi4mm_jax.processing.prompt import Tokens

ROOT = Path(__file__).parents[2]
IMAGE, CLIP = TINY / "inputs" / "image_0.png", TINY / "inputs" / "audio_0.flac"
SETTINGS = Settings(max_new_tokens=6)


@pytest.fixture(scope="module")
def engine(tiny):
    return tiny.engine(EngineConfig(slots=1, cache_tokens=4096, page_size=32, chunk=256))


class Terminal:
    """Types lines, among which may be exceptions to raise, and keeps what is shown."""

    def __init__(self, *lines: str | type[BaseException]):
        self.lines, self.out, self.told = [*lines, EOFError], io.StringIO(), []

    def read(self) -> str:
        line = self.lines.pop(0)
        if isinstance(line, str):
            return line
        raise line

    def talk(self, processor: Processor, engine: Any, settings: Settings = SETTINGS) -> Conversation:
        start = Conversation()
        return converse(processor, engine, start, settings, self.read, self.out, self.told.append)

    @property
    def errors(self) -> list[str]:
        return [told for told in self.told if told.startswith("error: ")]


def answers(engine, *turns: Any, system: str | None = None) -> list[str]:
    """What the model says to these turns as requests of their own."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    said = []
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        ((_, completion),) = engine.run([Request(list(messages), max_new_tokens=6)])
        assert completion.error is None
        said.append(completion.text)
        drawn = completion.tokens[:-1] if completion.finish_reason == "stop" else completion.tokens
        messages.append({"role": "assistant", "content": Tokens(tuple(drawn))})
    return said


@pytest.mark.slow
def test_several_turns_with_media(tiny, engine):
    terminal = Terminal(
        "/system Be brief.", "Hello", f"/image {IMAGE}", "  What is this?  ", "", f"/audio {CLIP}", "", "And?"
    )
    conversation = terminal.talk(tiny.processor, engine)
    expected = answers(
        engine,
        "Hello",
        [{"type": "image", "image": IMAGE}, {"type": "text", "text": "What is this?"}],
        [{"type": "audio", "audio": CLIP}, {"type": "text", "text": ""}],
        "And?",
        system="Be brief.",
    )
    assert terminal.out.getvalue() == "".join(f"{text}\n" for text in expected)
    assert [turn.answer for turn in conversation.turns] == expected
    assert terminal.errors == []
    image, clip = tiny.processor.count_image_tokens(IMAGE), tiny.processor.count_audio_tokens(CLIP)
    assert [t for t in terminal.told if "attached" in t] == [
        f"image attached, {image} tokens; say what to do with it",
        f"audio attached, {clip} tokens; say what to do with it",
    ]


def test_a_turn_prefills_only_what_is_new(tiny, engine):
    """Of a conversation, whose pages are kept, only from the last whole page on."""
    before = engine.runner.num_prefilled_tokens
    conversation = Terminal("/system Be kind.", f"/image {IMAGE}", "What?", "And now?").talk(tiny.processor, engine)
    first = replace(conversation, turns=(replace(conversation.turns[0], answer=None),))
    prompt = tiny.processor.row(chat.messages_of(first, chat.as_medium)).tokens
    new = engine.runner.num_prefilled_tokens - before - len(prompt)
    assert 0 < new < 64


def test_video(tiny, engine, tmp_path: Path):
    for n in range(3):
        Image.new("RGB", (60, 40), (80 * n, 0, 0)).save(tmp_path / f"{n}.png")
    terminal = Terminal(f"/video {tmp_path}", "What happens?", f"/save {tmp_path / 'a.jsonl'}")
    terminal.talk(tiny.processor, engine, replace(SETTINGS, frames=2))
    part = {"type": "video", "video": str(tmp_path), "frames": 2}
    (expected,) = answers(engine, [part, {"type": "text", "text": "What happens?"}])
    assert terminal.out.getvalue() == expected + "\n"
    frame = tiny.processor.count_image_tokens(tmp_path / "0.png")
    assert terminal.told[0].startswith(f"video attached, {2 * frame} tokens")
    messages = json.loads((tmp_path / "a.jsonl").read_text())["messages"]
    assert messages[0]["content"][0] == part


def asked(engine, messages: list[dict[str, Any]], tokens: int, **options: Any) -> Any:
    ((_, completion),) = engine.run([Request(messages, max_new_tokens=tokens, **options)])
    assert completion.error is None
    return completion


def test_a_cut_answer_is_continued(tiny, engine):
    """Twice: the tokens are those of one answer that was not cut."""
    terminal = Terminal("Tell me a story", "/continue", "/continue", "b")
    conversation = terminal.talk(tiny.processor, engine)
    whole = asked(engine, [{"role": "user", "content": "Tell me a story"}], 18)
    assert conversation.turns[0].tokens == tuple(whole.tokens)
    assert conversation.turns[0].answer.strip("\ufffd") in whole.text
    assert len(conversation.turns) == 2
    messages = [{"role": "user", "content": "Tell me a story"},
        {"role": "assistant", "content": Tokens(tuple(whole.tokens))}, {"role": "user", "content": "b"}]  # fmt: skip
    assert conversation.turns[1].answer == asked(engine, messages, 6).text


def test_an_answer_begins_as_told(tiny, engine, tmp_path: Path):
    """The next one alone; as a request with continue_final_message, and as that it is in what follows."""
    path = tmp_path / "a.jsonl"
    terminal = Terminal("/begin Yes, the", "Hello", "And?", f"/save {path}")
    conversation = terminal.talk(tiny.processor, engine)
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Yes, the"}]
    first = asked(engine, messages, 6, continue_final_message=True)
    messages[1]["content"] = ["Yes, the", Tokens(tuple(first.tokens))]
    second = asked(engine, [*messages, {"role": "user", "content": "And?"}], 6)
    assert terminal.out.getvalue() == f"Yes, the{first.text}\n{second.text}\n"
    assert conversation.turns[0].answer == f"Yes, the{first.text}"
    assert json.loads(path.read_text())["messages"][1] == {"role": "assistant", "content": f"Yes, the{first.text}"}


def test_an_answer_that_a_text_stopped_is_continued_as_text(tiny, engine):
    whole = asked(engine, [{"role": "user", "content": "Hello"}], 6).text
    stop = whole[2]
    conversation = Terminal("Hello", "/continue").talk(tiny.processor, engine, replace(SETTINGS, stop=(stop,)))
    said = whole[: whole.index(stop)]
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": said}]
    assert (
        conversation.turns[0].answer
        == said + asked(engine, messages, 6, stop=(stop,), continue_final_message=True).text
    )


def test_undo_and_reset(tiny, engine):
    terminal = Terminal("a", "b", f"/image {IMAGE}", "/undo", "/undo", "c", "/reset", "d", "/undo", "/undo")
    conversation = terminal.talk(tiny.processor, engine)
    a, c = answers(engine, "a", "c")
    b, d = answers(engine, "a", "b")[1], answers(engine, "d")[0]
    assert terminal.out.getvalue() == f"{a}\n{b}\n{c}\n{d}\n"
    assert conversation == Conversation()
    assert terminal.told[-2:] == ["the last turn is taken back, 0 are left", "error: there is no turn to take back"]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/nonsense", "error: there is no command /nonsense; /help lists them"),
        ("/", "error: there is no command /; /help lists them"),
        ("/image", "error: /image needs the name of a file: /image FILE"),
        ("/save  ", "error: /save needs the name of a file"),
        ("/image nowhere.png", "error: image 1 ('nowhere.png'): the file does not exist; check the path"),
        ("/audio nowhere.wav", "error: audio 1 ('nowhere.wav'): the file does not exist; check the path"),
        ("/video nowhere.mp4", "error: video 1 ('nowhere.mp4'): the file does not exist; check the path"),
        (f"/image {CLIP}", "the file is in no format that Pillow reads"),
        ("/save /", "error: / exists already; choose another name"),
        ("/save /nowhere/a.json", "error: /nowhere/a.json: cannot be written (No such file or directory)"),
        ("/undo", "error: there is no turn to take back"),
        ("What is <|image_1|>?", "error: <|image_1|> would be text: /image FILE"),
        ("/continue", "error: there is no answer to continue; /begin TEXT"),
    ],
)
def test_what_goes_wrong_is_one_line(tiny, engine, line: str, told: str):
    terminal = Terminal("a", "/reset", line, "a")
    conversation = terminal.talk(tiny.processor, engine)
    assert len(conversation.turns) == 1
    (error,) = terminal.errors
    assert told in error
    assert "\n" not in error


def test_help_names_every_command(tiny, engine):
    terminal = Terminal("/help", "/quit", "never read")
    terminal.talk(tiny.processor, engine)
    assert terminal.lines == ["never read", EOFError]
    for name in ("image", "audio", "video", "system", "begin", "continue", "undo", "reset", "save", "help", "quit"):
        assert f"/{name}" in terminal.told[0]


def test_ctrl_c_at_the_prompt(tiny, engine):
    terminal = Terminal("a", KeyboardInterrupt, "b")
    assert len(terminal.talk(tiny.processor, engine).turns) == 2


def test_ctrl_c_stops_the_answer(tiny, engine):
    """What was said stays; the engine is as good as before."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a program in the background begins with it ignored
    steps = 0
    step = engine.step

    def interrupted():
        nonlocal steps
        steps += 1
        updates = step()
        if steps == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return updates

    engine.step = interrupted
    try:
        terminal = Terminal("Tell me a story", "b")
        conversation = terminal.talk(tiny.processor, engine, Settings(max_new_tokens=400, stop=("<|end|>",)))
    finally:
        del engine.step
    first, second = conversation.turns
    request = Request([{"role": "user", "content": "Tell me a story"}], max_new_tokens=400)
    whole = "".join(engine.stream(request))
    assert 0 < len(first.answer) < len(whole)
    assert whole.startswith(first.answer)
    assert "cancelled" in terminal.told[0]
    assert second.answer
    assert engine.idle
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_twice_ends_the_program():
    with chat.interrupts() as pressed:
        assert not pressed()
        signal.raise_signal(signal.SIGINT)
        assert pressed()
        with pytest.raises(SystemExit) as ended:
            signal.raise_signal(signal.SIGINT)
    assert ended.value.code == 130


def with_cache(engine, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if it had less, which another engine would compile its programs for."""
    monkeypatch.setattr(engine, "config", replace(engine.config, cache_tokens=tokens))


def test_a_conversation_that_outgrows_the_cache(tiny, engine, monkeypatch: pytest.MonkeyPatch):
    """The count, and what to do; then it goes on."""
    with_cache(engine, 512, monkeypatch)
    terminal = Terminal("a", "b " * 600, f"/image {IMAGE}", "What?", "/undo", "c")
    conversation = terminal.talk(tiny.processor, engine)
    assert [turn.text for turn in conversation.turns] == ["a", "c"]
    assert len(terminal.errors) == 2
    messages = chat.messages_of(replace(conversation, turns=conversation.turns[:1]), chat.as_medium, sampled=True)
    parts = [{"type": "image", "image": IMAGE}, {"type": "text", "text": "What?"}]
    for error, content in zip(terminal.errors, [("b " * 600).strip(), parts], strict=True):
        tokens = len(tiny.processor.row([*messages, {"role": "user", "content": content}]).tokens)
        assert error == (
            f"error: the conversation has {tokens} tokens; --cache-tokens are 512, for the answer too. "
            "Nothing was said; /undo takes back what is attached or came before, /reset all"
        )


def test_a_conversation_that_outgrows_the_context(tiny, engine):
    p = tiny.processor
    narrow = Processor(p.config, p.tokenizer, p.dynamic_hd, 100)
    terminal = Terminal("a", "b " * 600, "c")
    assert len(terminal.talk(narrow, engine).turns) == 2
    (error,) = terminal.errors
    assert "more than the context of 100" in error
    assert "/reset" in error


def test_an_answer_is_cut_where_the_cache_ends(tiny, engine, monkeypatch: pytest.MonkeyPatch):
    with_cache(engine, 64, monkeypatch)
    terminal = Terminal("Tell me a story")
    conversation = terminal.talk(tiny.processor, engine, Settings(max_new_tokens=1000))
    row = tiny.processor.row([{"role": "user", "content": "Tell me a story"}])
    assert conversation.turns[0].answer
    assert f"[{len(row.tokens)} tokens in, {64 - len(row.tokens)} out, ended by length]" in terminal.told


def test_saved_conversations_are_lines_for_batch(tiny, engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from phi4mm_jax.engine.jsonl import read_requests

    monkeypatch.chdir(TINY / "inputs")
    path = tmp_path / "saved.jsonl"
    terminal = Terminal("/system é", "/image image_0.png", "What?", f"/save {path}", f"/save {path}")
    conversation = terminal.talk(tiny.processor, engine)
    assert terminal.errors == [f"error: {path} exists already; choose another name"]
    (line,) = read_requests(path, max_new_tokens=1)
    assert line.error is None
    row = tiny.processor.row(line.request.prompt)
    expected = tiny.processor.row(chat.messages_of(conversation, chat.as_medium))
    np.testing.assert_array_equal(row.tokens, expected.tokens)


def test_earlier_answers_come_back_as_the_tokens_that_were_drawn(tiny):
    """Special tokens among them, and pieces that their text would be cut into otherwise; a placeholder is no medium."""
    special = tiny.processor.tokenizer.special_tokens
    drawn = (special["<|tool_call|>"], special["<|endoftext10|>"], *tiny.processor.tokenizer.encode("h"), 104)
    turns = Turn("Hello", answer="h", tokens=drawn), Turn("And?")
    row, _ = prepare(Conversation(turns=turns), tiny.processor, tiny.engine(EngineConfig(slots=1, cache_tokens=512)))
    encode = tiny.processor.tokenizer.encode
    expected = [
        *encode("<|user|>Hello<|end|><|assistant|>", special=True), *drawn,
        *encode("<|end|><|user|>And?<|end|><|assistant|>", special=True),
    ]  # fmt: skip
    assert row.tokens.tolist() == expected
    assert row.media == ()


def test_each_turn_samples_anew():
    """By the seed and the number of the turn."""
    settings = Settings(max_new_tokens=9, sampling=Sampling(2.0, seed=3))
    first, second = settings.request(0, 5), settings.request(1, 50)
    assert (first.max_new_tokens, second.max_new_tokens) == (5, 9)
    assert (first.sampling, second.sampling) == (Sampling(2.0, seed=3, stream=0), Sampling(2.0, seed=3, stream=1))


def test_conversations_without_a_seed_sample_by_their_prompts(tiny, engine):
    """As a request of its own with the same messages does, and not by a seed that all conversations share."""
    sampling, messages = Sampling(30.0), []
    terminal = Terminal("Hello", "And?")
    conversation = terminal.talk(tiny.processor, engine, Settings(max_new_tokens=6, sampling=sampling))
    for turn in conversation.turns:
        messages.append({"role": "user", "content": turn.text})
        ((_, expected),) = engine.run([Request(list(messages), max_new_tokens=6, sampling=sampling)])
        assert turn.answer == expected.text
        messages.append({"role": "assistant", "content": Tokens(turn.tokens)})
    assert len(conversation.turns) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"max_new_tokens": 0}, "max_new_tokens is 0"), ({"stop": ("",)}, "stop is"), ({"frames": 65}, "frames is 65")],
)
def test_settings_are_checked(settings: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        Settings(**settings)


@pytest.mark.subprocess
def test_the_program(engine):
    """Through its standard streams: answers go to one, all else to the other."""
    lines = ["Hello", "/image nowhere.png", "What is this?", "/nonsense", "/undo", "And?"]
    result = subprocess.run(
        [sys.executable, "-m", "infer.chat", "--model", str(TINY), "--dtype", "float32", "--max-new-tokens", "6",
         "--cache-tokens", "4096"],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        input="\n".join(lines).encode() + b" \xff\n",
        capture_output=True,
        timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr.decode()
    first, second = answers(engine, "Hello", "What is this?")
    third = answers(engine, "Hello", "And? \ufffd")[1]
    assert result.stdout.decode() == f"{first}\n{second}\n{third}\n"
    errors = [line for line in result.stderr.decode().splitlines() if line.startswith("error: ")]
    assert len(errors) == 2
    assert "nowhere.png" in errors[0]
    assert "/nonsense" in errors[1]
    assert b"Traceback" not in result.stderr


def test_arguments_are_checked_before_the_checkpoint_is_read(monkeypatch, capsys):
    monkeypatch.setattr("phi4mm_jax.load", None)  # not called
    for arguments, named in (
        (["--top-p", "2"], "--top-p is 2"),
        (["--frames", "0"], "--frames is 0"),
        (["--cache-tokens", "0"], "--cache-tokens is 0"),
    ):
        monkeypatch.setattr(sys, "argv", ["chat", "--model", "nowhere", *arguments])
        assert chat.main() == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert err.startswith("error: ")
        assert named in err
