"""The program infer.transcribe on recordings made of the small model's held-out clips."""

import json
import os
import sys
import time
from pathlib import Path

import jiwer
import numpy as np
import pytest
import soundfile
from helpers.recordings import RATE, held_clips, recording

import phi4mm_jax
from infer import transcribe as program
from phi4mm_jax import InputError
from phi4mm_jax.engine import EngineConfig, Sampling
from phi4mm_jax.processing.recordings import CutSettings, RecordedClip
from phi4mm_jax.transcription.recognition import Transcript, clip_request, transcribe

MODEL = Path(__file__).parents[2] / "assets" / "tiny"
CONFIG = EngineConfig(slots=2, cache_tokens=4096, page_size=64, chunk=64, steps=4, top_logprobs=3)


@pytest.fixture(scope="module")
def model():
    return phi4mm_jax.load(MODEL, dtype="float32", scan=True)


def run(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["transcribe", "--model", str(MODEL), *map(str, arguments)])
    return program.main()


@pytest.fixture
def engine(model, monkeypatch):
    """The engine of the program."""
    engine = model.engine(CONFIG)
    monkeypatch.setattr(program, "load_model", lambda *_, **__: model)
    monkeypatch.setattr(program, "make_engine", lambda *_: engine)
    return engine


def test_a_minute_in_all_formats(monkeypatch, tmp_path, engine, capsys):
    """Beside a file that is broken and one that is silent; run again, what is there is kept."""
    samples, said = recording(held_clips(12))
    talk, broken, silent = (tmp_path / name for name in ("talk.flac", "broken.wav", "silent.wav"))
    soundfile.write(talk, samples, RATE)
    soundfile.write(silent, np.zeros(12 * RATE), RATE)
    broken.write_bytes(b"RIFF")
    out = tmp_path / "out"
    given = ["--prompt", "hear", "--pause", 1, "--language", "en", "--output", out]
    given += [word for form in ("json", "srt", "vtt", "txt") for word in ("--format", form)]
    assert run(monkeypatch, *given, broken, silent, talk) == 1
    errors = capsys.readouterr().err
    assert f"error: {broken}: the audio clip cannot be read" in errors
    assert f"{out}: 2 of 3 recordings are transcribed" in errors
    names = {f"{name}.{form}" for name in ("talk", "silent") for form in ("json", "srt", "vtt", "txt")}
    assert {path.name for path in out.iterdir()} == names | {"transcripts.settings.json"}
    assert (out / "silent.txt").read_text() == "\n"
    found = json.loads((out / "talk.json").read_text())
    assert (found["language"], found["duration"]) == ("english", len(samples) / RATE)
    times = [(segment["start"], segment["end"]) for segment in found["segments"]]
    np.testing.assert_allclose(times, [(clip.start, clip.end) for clip in said], atol=0.3)
    texts = [segment["text"] for segment in found["segments"]]
    assert jiwer.wer([clip.text for clip in said], texts) < 0.1
    assert (out / "talk.txt").read_text() == " ".join(texts) + "\n"
    assert found["text"] == " ".join(texts)
    assert all(segment["avg_logprob"] < 0 for segment in found["segments"])
    for form in ("srt", "vtt"):
        assert all(text in (out / f"talk.{form}").read_text() for text in texts)

    before = (out / "talk.json").read_bytes()
    monkeypatch.setattr(program, "load_model", lambda *_, **__: pytest.fail("there is nothing to do"))
    assert run(monkeypatch, *given, silent, talk) == 0
    assert f"{talk} is transcribed already, in {out / 'talk.json'}, " in capsys.readouterr().err
    assert (out / "talk.json").read_bytes() == before
    assert run(monkeypatch, *given, "--max-new-tokens", 9, talk) == 2
    assert "its answers are of another max_new_tokens (was 512, now 9)" in capsys.readouterr().err


def test_a_newer_recording_is_transcribed_again(monkeypatch, tmp_path, engine, capfd):
    samples, said = recording(held_clips(1))
    soundfile.write(tmp_path / "a.wav", samples, RATE)
    given = ["--prompt", "hear", "--output", tmp_path, tmp_path / "a.wav"]
    assert run(monkeypatch, *given) == 0
    assert (tmp_path / "a.txt").read_text() == said[0].text + "\n"
    (tmp_path / "a.txt").write_text("old\n")
    os.utime(tmp_path / "a.wav", (time.time() + 9,) * 2)
    assert run(monkeypatch, *given) == 0
    assert (tmp_path / "a.txt").read_text() == said[0].text + "\n"
    assert "is newer than" in capfd.readouterr().err
    assert run(monkeypatch, "--prompt", "hear", tmp_path / "a.wav") == 0
    assert capfd.readouterr().out == said[0].text + "\n"
    assert run(monkeypatch, "--prompt", "hear", "--max-new-tokens", 1, tmp_path / "a.wav") == 0
    assert f"{tmp_path / 'a.wav'}: what is said at 0:00:00 is cut off by --max-new-tokens 1" in capfd.readouterr().err


def test_transcripts_of_other_settings_are_not_mixed(monkeypatch, tmp_path, engine, capfd):
    """Those of other recordings, and in other formats, count; without any a folder takes other settings."""
    for name in ("a", "b"):
        soundfile.write(tmp_path / f"{name}.wav", recording(held_clips(1))[0], RATE)
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("of the user's own\n")
    given = ["--prompt", "hear", "--output", out]
    assert run(monkeypatch, *given, tmp_path / "a.wav") == 0
    settings = (out / "transcripts.settings.json").read_bytes()
    for more in ([tmp_path / "b.wav"], [tmp_path / "a.wav", "--format", "srt"]):
        assert run(monkeypatch, *given, "--max-new-tokens", 9, *more) == 2
        assert "its answers are of another max_new_tokens (was 512, now 9)" in capfd.readouterr().err
    assert (out / "transcripts.settings.json").read_bytes() == settings
    assert {path.name for path in out.iterdir()} == {"a.txt", "notes.txt", "transcripts.settings.json"}
    for path in out.glob("*.txt"):
        path.unlink()
    assert run(monkeypatch, *given, "--max-new-tokens", 9, tmp_path / "b.wav") == 0


def test_ctrl_c_leaves_no_half_written_file(monkeypatch, tmp_path, engine):
    """The recording that was done before is there."""
    for name in ("a", "b"):
        soundfile.write(tmp_path / f"{name}.wav", recording(held_clips(1))[0], RATE)
    written, write = [], program.write_atomically

    def interrupted(path, text):
        if written:
            raise KeyboardInterrupt
        write(path, text)
        written.append(path)

    monkeypatch.setattr(program, "write_atomically", interrupted)
    files = [tmp_path / "a.wav", tmp_path / "b.wav"]
    assert run(monkeypatch, "--prompt", "hear", "--output", tmp_path / "out", *files) == 130
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"transcripts.settings.json", written[0].name}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.wav", "b.wav"], "standard output takes one FILE in one --format; give --output"),
        (["a.wav", "--format", "srt", "--format", "txt"], "standard output takes one FILE in one --format"),
        (["a.wav", "x/a.mp3", "--output", "out"], "a.wav and x/a.mp3 would both be written to out/a.txt"),
        (["a.wav", "--prompt", "p", "--translate-to", "de"], "--prompt does not go with --translate-to"),
        (["a.wav", "--clip-seconds", "50"], "--clip-seconds is 50.0; expected seconds from 1 to 40"),
        (["a.wav", "--max-new-tokens", "0"], "--max-new-tokens is 0"),
    ],
)
def test_arguments_are_checked_first(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(program, "load_model", lambda *_, **__: pytest.fail("the model is read"))
    assert run(monkeypatch, *arguments) == 2
    assert message in capsys.readouterr().err


def test_a_recording_is_not_replaced_by_its_transcript(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"")
    with pytest.raises(InputError, match="is a recording, which its own transcript would replace"):
        program.jobs_of([tmp_path / "a.txt"], tmp_path, ["txt"])


def test_what_the_model_is_told(monkeypatch):
    def told(*arguments):
        monkeypatch.setattr(sys, "argv", ["transcribe", "--model", "m", "a.wav", *arguments])
        return program.task_of(program.parse_arguments())

    assert told() == ("transcribe", "Transcribe the audio clip into text.")
    assert told("--prompt", "hear") == ("transcribe", "hear")
    assert told("--translate-to", "de") == ("translate", "Translate the audio to German.")


@pytest.mark.slow
def test_ten_minutes_are_understood_as_their_clips_are(model):
    """Word errors within a point of those of the clips alone, and times within 0.3 s.

    Beside digital silence a clip of the recording is the clip to the sample, in whatever order they are: it is asked
    alone once. In the noise of a room they are in the same noise alone; then the mean of two draws counts.
    """
    engine, more, answers = model.engine(CONFIG), [], {}

    def request(clip):
        return clip_request(clip, "hear", max_new_tokens=64, sampling=Sampling())

    for noise, seed, shuffled in ((0.004, 0, False), (0.004, 1, False), *((0.0, seed, True) for seed in range(2))):
        clips = held_clips(100)
        if shuffled:
            clips = [clips[i] for i in np.random.default_rng(seed).permutation(len(clips))]
        samples, said = recording(clips, pauses=(2, 4.5), noise=noise, seed=seed)
        assert len(samples) > 560 * RATE
        ((_, found),) = transcribe(engine, [(samples, RATE)], request, CutSettings(pause=1))
        assert isinstance(found, Transcript), found
        times = [(segment.start, segment.end) for segment in found.segments]
        np.testing.assert_allclose(times, [(clip.start, clip.end) for clip in said], atol=0.3)
        sounds = [samples[clip.place].tobytes() for clip in said]
        new = {sound: clip.place for sound, clip in zip(sounds, said, strict=True) if sound not in answers}
        asked = (RecordedClip(samples[place], RATE, place.start, None) for place in new.values())
        answers |= {list(new)[i]: answer.text for i, answer in engine.run(map(request, asked))}
        words, texts = [clip.text for clip in said], [segment.text for segment in found.segments]
        alone = [answers[sound] for sound in sounds]
        more.append(jiwer.wer(words, texts) - jiwer.wer(words, alone))
    *rooms, _, _ = more
    assert np.mean(rooms) <= 0.01, more
    assert max(more[len(rooms) :]) <= 0.01, more
