"""Recordings cut at silence: where, and that no sample is lost or there twice."""

import sys
import tracemalloc
from math import gcd

import av
import numpy as np
import pytest
import scipy.signal
import soundfile
from helpers.recordings import held_clips, recording

from phi4mm_jax import InputError
from phi4mm_jax.processing.audio import announced_seconds, stream_audio
from phi4mm_jax.processing.recordings import CutSettings, cut_blocks, cut_recording

RATE = 16000


def tone(seconds: float, loudness: float = 0.2, rate: int = RATE) -> np.ndarray:
    return (loudness * np.sin(2 * np.pi * 440 * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def silence(seconds: float, rate: int = RATE) -> np.ndarray:
    """A quiet room: a few steps of 16 bits."""
    return (1e-4 * np.random.default_rng(0).standard_normal(round(seconds * rate))).astype(np.float32)


def digital_silence(seconds: float) -> np.ndarray:
    return np.zeros(round(seconds * RATE), np.float32)


def cut(*parts: np.ndarray, rate: int = RATE, **settings) -> tuple[list[tuple[float, float]], list]:
    """Where clips begin and end, in seconds, and where speech does in each."""
    clips = list(cut_recording((np.concatenate(parts), rate), CutSettings(**settings)))
    return [(clip.first / clip.rate, clip.first / clip.rate + clip.seconds) for clip in clips], [
        clip.speech for clip in clips
    ]


def check(found, expected) -> None:
    places, speech = found
    assert [span is None for span in speech] == [span is None for _, span in expected]
    np.testing.assert_allclose(places, [place for place, _ in expected], atol=0.05)
    spoken = [span for span in speech if span is not None]
    np.testing.assert_allclose(spoken, [span for _, span in expected if span is not None], atol=0.05)


@pytest.mark.parametrize("rate", [8000, 16000, 44100])
def test_cuts_are_in_the_middle_of_the_longest_silence(rate):
    """3 s of speech, 0.5 of silence, 2 s, 1 s of silence, 3 s, 0.4 s of silence, 4 s: within 10 s the second one."""
    lengths = (3, 0.5, 2, 1, 3, 0.4, 4)
    parts = [(silence if i % 2 else tone)(seconds, rate=rate) for i, seconds in enumerate(lengths)]
    expected = [((0, 6), (0, 5.5)), ((6, 6.4), None), ((6.4, 13.9), (6.5, 13.9))]
    check(cut(*parts, rate=rate, clip_seconds=10), expected)


def test_of_equal_silences_the_last_is_cut():
    parts = [tone(3), silence(0.6), tone(3), silence(0.6), tone(6)]
    expected = [((0, 6.9), (0, 6.6)), ((6.9, 7.1), None), ((7.1, 13.2), (7.2, 13.2))]
    check(cut(*parts, clip_seconds=10), expected)


def test_pauses_are_clips_without_speech():
    """They begin half a second after speech, and end a tenth before it."""
    parts = [silence(5), tone(3), silence(5), tone(2), silence(5)]
    expected = [
        ((0, 4.9), None), ((4.9, 8.5), (5, 8)), ((8.5, 12.9), None), ((12.9, 15.5), (13, 15)), ((15.5, 20), None)
    ]  # fmt: skip
    check(cut(*parts), expected)


def test_no_digital_silence_is_kept_around_speech():
    """Of what was recorded beside speech, as much as of any silence."""
    parts = [digital_silence(5), silence(0.06), tone(3), digital_silence(5), tone(2), silence(0.3), digital_silence(5)]
    expected = [
        ((0, 5), None), ((5, 8.06), (5.06, 8.06)), ((8.06, 13.06), None), ((13.06, 15.36), (13.06, 15.06)),
        ((15.36, 20.36), None),
    ]  # fmt: skip
    check(cut(*parts), expected)


def test_digital_silence_is_cut_to_the_sample():
    """A clip has nothing of it, wherever it begins and ends; a few samples that are zero are none."""
    sound = silence(2.0123)
    sound[RATE // 20 : -RATE // 4] += tone(3)[: len(sound) - RATE // 20 - RATE // 4]
    sound[[0, -1]], sound[RATE : RATE + 10] = 1e-3, 0
    rests = [round(seconds * RATE) for seconds in (1.2345, 3.0013, 1.4997, 0.0071)]
    parts = [np.pad(sound, (rest, 0)) for rest in rests[:-1]]
    clips = list(cut_recording((np.concatenate([*parts, np.zeros(rests[-1])]), RATE), CutSettings(pause=1)))
    spoken = [clip for clip in clips if clip.speech is not None]
    starts = np.cumsum([len(part) for part in parts]) - len(sound)
    assert [clip.first for clip in spoken] == starts.tolist()
    for clip in spoken:
        np.testing.assert_array_equal(clip.samples, sound.astype(np.float32))
    assert [len(clip.samples) for clip in clips if clip.speech is None] == rests


def test_a_clips_own_noise_is_not_said_to_be_speech():
    """Between digital silences, where the detector takes what is behind these words for speech as well."""
    clips = [clip for clip in held_clips(100) if clip[1] in ("orange", "ten clock hand cow", "violin water farm eight")]
    samples, said = recording(clips, noise=0)
    spoken = [clip.speech for clip in cut_recording((samples, RATE), CutSettings(pause=1)) if clip.speech is not None]
    np.testing.assert_allclose(spoken, [(clip.start, clip.end) for clip in said], atol=0.3)


@pytest.mark.parametrize("behind", [0.5, 1.99, 3])
def test_no_digital_silence_is_kept_at_the_end(behind):
    """Also where it is shorter than a pause, which is what ends a clip elsewhere."""
    check(cut(tone(2), digital_silence(behind)), [((0, 2), (0, 2)), ((2, 2 + behind), None)])


def test_without_silence_the_quietest_place_is_cut():
    places, speech = cut(tone(6), tone(0.2, 0.02), tone(6), clip_seconds=10)
    assert len(places) == 2
    assert 6.0 < places[1][0] < 6.2
    assert speech[0][1] == speech[1][0] == places[1][0]


@pytest.mark.parametrize("sound", [silence(30), 0.003 * np.random.default_rng(0).standard_normal(30 * RATE)])
def test_silence_and_noise_have_no_speech(sound):
    places, speech = cut(sound.astype(np.float32), clip_seconds=10)
    assert set(speech) == {None}
    assert places[-1][1] == 30


def test_a_click_is_no_speech():
    clicks = silence(10)
    clicks[:: 2 * RATE] = 0.5
    assert set(cut(clicks)[1]) == {None}


def sounds(rng: np.random.Generator, rate: int) -> np.ndarray:
    """Tones, noises and silences of any length and loudness."""
    parts = []
    for kind in rng.integers(3, size=12):
        seconds = float(rng.choice([0.03, 0.3, 1, 4])) * rng.uniform(0.5, 1.5)
        loudness = 10 ** rng.uniform(-4, -0.5)
        made = (silence(seconds, rate), tone(seconds, loudness, rate),
                loudness * rng.standard_normal(round(seconds * rate)))  # fmt: skip
        parts.append(made[kind])
    return np.concatenate(parts).astype(np.float32)


@pytest.mark.parametrize("rate", [8000, 16000, 22050])
def test_no_sample_is_lost_or_twice(rate):
    """Clips joined are the recording, resampled by scipy, however it comes; none is too long."""
    rng = np.random.default_rng(rate)
    new = rate if rate == 8000 else RATE
    for _ in range(6):
        samples = sounds(rng, rate)
        settings = CutSettings(clip_seconds=float(rng.uniform(1, 6)), pause=float(rng.uniform(0.2, 2)))
        whole = scipy.signal.resample_poly(samples.astype(np.float64), new // gcd(new, rate), rate // gcd(new, rate))
        whole = samples if rate == new else whole.astype(np.float32)
        places = np.sort(rng.integers(len(samples), size=5))
        blocks = [(block, rate) for block in np.split(samples, places)]
        clips = list(cut_blocks(blocks, settings))
        np.testing.assert_array_equal(np.concatenate([clip.samples for clip in clips]), whole)
        assert [clip.first for clip in clips] == np.cumsum([0, *(len(clip.samples) for clip in clips[:-1])]).tolist()
        assert max(clip.seconds for clip in clips) < settings.clip_seconds + 0.04
        for clip in clips:
            start, stop = clip.first / clip.rate, (clip.first + len(clip.samples)) / clip.rate
            begin, end = (start, stop) if clip.speech is None else clip.speech
            assert start <= begin < end <= stop


def test_memory_does_not_grow_with_a_recording():
    block = np.concatenate([tone(20), silence(10)])
    tracemalloc.start()
    count = sum(len(clip.samples) for clip in cut_blocks(((block, RATE) for _ in range(20)), CutSettings()))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 20 * len(block)
    assert peak < 8 * block.nbytes


@pytest.mark.parametrize("form", ["wav", "flac", "ogg", "mkv"])
def test_files_are_read_block_by_block(form, tmp_path):
    """A file of more than one block of 2**20 samples, by its path and its bytes; as soundfile, or PyAV, reads it."""
    path, samples = tmp_path / f"a.{form}", np.stack([tone(70), tone(70, 0.1)], 1)
    if form == "mkv":
        with av.open(str(path), "w") as container:
            stream = container.add_stream("pcm_s16le", rate=RATE)
            stream.layout = "stereo"
            pcm = np.round(samples * 32767).astype(np.int16)
            for start in range(0, len(pcm), RATE):
                piece = np.ascontiguousarray(pcm[start : start + RATE].reshape(1, -1))
                frame = av.AudioFrame.from_ndarray(piece, format="s16", layout="stereo")
                frame.sample_rate = RATE
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        expected, tolerance = pcm.astype(np.float32) / 32768, 1e-6
    else:
        soundfile.write(path, samples, RATE)
        expected, tolerance = soundfile.read(path, dtype="float32")[0], 1e-6
    for source in (path, path.read_bytes()):
        blocks = list(stream_audio(source))
        assert len(blocks) > 1
        assert {rate for _, rate in blocks} == {RATE}
        np.testing.assert_allclose(np.concatenate([block for block, _ in blocks]), expected.mean(1), atol=tolerance)
        assert announced_seconds(source) == pytest.approx(70, abs=0.1)


def test_a_file_that_is_cut_off_is_an_error_where_it_ends(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(100), RATE)
    (tmp_path / "a.wav").write_bytes((tmp_path / "a.wav").read_bytes()[: 2 * 80 * RATE])
    clips = cut_recording(tmp_path / "a.wav")
    assert next(clips).seconds > 1
    with pytest.raises(InputError, match="the audio clip is cut off"):
        list(clips)


def test_a_recording_without_samples_is_an_error(tmp_path):
    soundfile.write(tmp_path / "a.wav", silence(0), RATE)
    with pytest.raises(InputError, match="the recording has no samples; check that it is whole"):
        list(cut_recording(tmp_path / "a.wav"))


def test_samples_that_are_no_numbers_are_an_error():
    with pytest.raises(InputError, match="samples that are NaN or infinite"):
        list(cut_recording((np.full(RATE, np.nan, np.float32), RATE)))


@pytest.mark.parametrize(("name", "value"), [("clip_seconds", 0.5), ("clip_seconds", 41), ("pause", 0), ("pause", "1")])
def test_settings_out_of_range_are_named(name, value):
    with pytest.raises(InputError, match=f"{name} is {value!r}; expected seconds from "):
        CutSettings(**{name: value})


def test_a_missing_detector_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "webrtcvad", None)
    with pytest.raises(InputError, match=r"needs webrtcvad, .* pip install '\.\[transcribe\]'$"):
        next(cut_recording((tone(1), RATE)))
