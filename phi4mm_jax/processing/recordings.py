"""Recordings of any length, cut at silence into clips that the model takes well.

WebRTC's voice activity detector (webrtcvad) finds speech and silence. The clips tile the recording: each sample
is in exactly one. Those without speech are not worth asking about, and tempt the model to make words up.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from phi4mm_jax.errors import InputError
from phi4mm_jax.processing.audio import AudioSource, stream_audio
from phi4mm_jax.processing.audio_features import check_scale, feature_rate, resample_blocks
from phi4mm_jax.utils.checks import is_number

MAX_CLIP_SECONDS = 40.0  # the speech encoder attends within 40 s
MIN_CLIP_SECONDS = 1.0

_FRAMES = 50  # a second; the detector takes frames of 20 ms
_MODE = 1  # of 0 to 3; from 2 on it misses quiet speech
_HANGOVER = 7  # frames after the end of speech that the detector still takes for it
_WINDOW, _ONSET = 20, 8  # speech begins where so many frames of a window are: clicks are shorter
_MIN_SILENCE = 10  # frames; shorter ones may be within a word
_MAX_LEAD, _MAX_TAIL = 5, 25  # frames of silence that are kept before and after speech
_DIGITAL = 2.0**-30  # power of one step of 16 bits: below it nothing was recorded, and none of it is kept
_DIGITAL_RUN = 1000  # of a second: a shorter run of samples below it, beside no others, is no silence
# Power beside a clip's loudest frame that is not said to be speech where it begins and ends; more where there is noise,
# which is the quietest tenth of its frames if that is so quiet.
_QUIET, _NOISE = 10**-3.0, 10**-2.0
_SMOOTH = 5  # frames over which loudness is averaged to find the quietest place


@dataclass(frozen=True)
class CutSettings:
    """Settings by which a recording is cut.

    Attributes:
        clip_seconds: of the longest clip. Speech that lasts longer is cut in the middle of its longest silence, and
            where it has none of 0.2 s, at the quietest place of the second half.
        pause: seconds of silence that end a clip in any case.

    Raises:
        InputError: a number is out of range.
    """

    clip_seconds: float = MAX_CLIP_SECONDS
    pause: float = 2.0

    def __post_init__(self):
        for name, low, high in (("clip_seconds", MIN_CLIP_SECONDS, MAX_CLIP_SECONDS), ("pause", 0.2, 3600.0)):
            value = getattr(self, name)
            if not is_number(value) or not low <= value <= high:
                raise InputError(f"{name} is {value!r:.60}; expected seconds from {low:g} to {high:g}")


@dataclass(frozen=True)
class RecordedClip:
    """A clip of a recording.

    Attributes:
        samples: mono, of full scale 1.
        rate: in Hz, 8000 or 16000.
        first: the number of the first sample in the recording, at this rate.
        speech: the seconds of the recording at which speech begins and ends in the clip; None where it has none.
    """

    samples: Float[np.ndarray, " S"]
    rate: int
    first: int
    speech: tuple[float, float] | None

    @property
    def seconds(self) -> float:
        """Length of the clip."""
        return len(self.samples) / self.rate


def cut_recording(source: AudioSource, settings: CutSettings | None = None) -> Iterator[RecordedClip]:
    """Read a recording and yield its clips, in order; it is read as they are asked for.

    Args:
        source: as of `load_audio`; however long.

    Raises:
        InputError: the recording has no samples or cannot be read, or the detector is not installed.
    """
    check_detector()
    clip = None
    for clip in cut_blocks(stream_audio(source), CutSettings() if settings is None else settings):
        yield clip
    if clip is None:
        raise InputError("the recording has no samples; check that it is whole, or leave it out")


def check_detector() -> None:
    """Raise an InputError where the voice activity detector is not installed."""
    try:
        import webrtcvad  # noqa: F401
    except ImportError:
        raise InputError(
            "cutting a recording at silence needs webrtcvad, which the extra 'transcribe' brings; "
            "pip install '.[transcribe]'"
        ) from None


def cut_blocks(blocks: Iterable[tuple[Float[np.ndarray, " S"], int]], settings: CutSettings) -> Iterator[RecordedClip]:
    """Yield the clips of a recording that comes in blocks of samples, each with the rate.

    At rates other than 8 and 16 kHz it is resampled to 16 kHz, as it would be for the model. Only what is not yet cut
    is kept.

    Raises:
        InputError: samples are NaN, infinite or far out of scale.
    """
    iterator = iter(blocks)
    first = next(iterator, None)
    if first is None:
        return
    rate = first[1]

    def checked() -> Iterator[np.ndarray]:
        for block in _chain(first[0], iterator):
            if len(block):
                check_scale(block)
                yield block

    cutter = _Cutter(feature_rate(rate), settings)
    for samples in resample_blocks(checked(), rate):
        yield from cutter.add(samples)
    yield from cutter.finish()


def _chain(first: np.ndarray, rest: Iterator[tuple[np.ndarray, int]]) -> Iterator[np.ndarray]:
    yield first
    for block, _ in rest:
        yield block


class _Cutter:
    """Cuts samples as they come.

    The clip that is growing is looked at frame by frame. While it has no speech it waits for some; from then on for a
    pause, or for its end. What is left behind a cut is looked at again as the beginning of the next clip.
    """

    def __init__(self, rate: int, settings: CutSettings):
        import webrtcvad

        self._detector = webrtcvad.Vad(_MODE)
        self._rate, self._frame = rate, rate // _FRAMES
        self._max_frames = round(settings.clip_seconds * _FRAMES)
        self._pause = round(settings.pause * _FRAMES)
        self._lead, self._tail = (min(self._pause // 2, limit) for limit in (_MAX_LEAD, _MAX_TAIL))
        self._first = 0  # sample of the recording with which the frames begin
        self._given = 0  # samples of the first frame that belong to the clip before
        self._samples = np.zeros(0, np.float32)  # of the clip and what follows it
        self._voiced: list[bool] = []  # of their whole frames
        self._power: list[float] = []  # likewise
        self._restart()

    def _restart(self) -> None:
        self._seen = 0  # frames that were looked at
        self._begin: int | None = None  # frame at which speech begins
        self._end = 0  # frame after the last speech so far
        self._run = 0  # voiced frames in a row, up to here
        self._silences: list[tuple[int, int]] = []  # between speech, by frames

    def add(self, samples: Float[np.ndarray, " S"]) -> Iterator[RecordedClip]:
        """Take more of the recording; yield the clips that have ended."""
        for start in range(0, len(samples), self._frame * self._max_frames):  # so that little is kept besides the clip
            self._take(samples[start : start + self._frame * self._max_frames])
            yield from self._cut()

    def finish(self) -> Iterator[RecordedClip]:
        """Yield what is left: the last clip, and digital silence behind it as one of its own."""
        end = self._seen if self._run else self._end  # speech that has not ended has no delay to take off
        stop = len(self._samples)
        if self._begin is not None:
            rest = self._samples[len(self._power) * self._frame :]  # less than a frame
            recorded = (np.square(rest) >= _DIGITAL).any()
            stop = self._recorded_stop(self._begin, stop) if recorded else self._stop(self._begin, len(self._power))
        if stop < len(self._samples):
            yield self._cut_clip(stop, end)
        if len(self._samples) > self._given:
            yield self._cut_clip(len(self._samples), end)

    def _take(self, samples: Float[np.ndarray, " S"]) -> None:
        self._samples = np.concatenate([self._samples, samples])
        known = len(self._voiced) * self._frame
        whole = (len(self._samples) - known) // self._frame * self._frame
        frames = self._samples[known : known + whole].reshape(-1, self._frame)
        power = np.square(frames).mean(1)
        self._power += power.tolist()
        pcm = np.round(np.clip(frames, -1, 1) * 32767).astype("<i2")
        voiced = np.array([self._detector.is_speech(frame.tobytes(), self._rate) for frame in pcm], bool)
        self._voiced += (voiced & (power >= _DIGITAL)).tolist()  # the detector's delay reaches into digital silence

    def _cut(self) -> Iterator[RecordedClip]:
        while self._seen < len(self._voiced):
            self._look()
            if self._begin is None:
                if self._seen >= self._max_frames:
                    yield self._cut_clip((self._seen - _WINDOW - self._lead) * self._frame)
            elif (start := self._start(self._begin)) > self._given:  # silence before it is a clip of its own
                yield self._cut_clip(start)
            elif self._seen - self._end >= self._pause:
                stop = min(self._end + self._tail, self._seen)
                yield self._cut_clip(self._stop(self._begin, stop), self._end)
            elif self._seen >= self._max_frames:
                end, at = self._best_cut(self._begin)
                yield self._cut_clip(at * self._frame, end)

    def _look(self) -> None:
        """Look at one more frame."""
        voiced = self._voiced[self._seen]
        if voiced and not self._run:
            self._silences.append((self._end, self._seen))
        if not voiced and self._run and self._power[self._seen] < _DIGITAL:
            self._end = self._seen  # where the detector has no delay to take off
        self._seen += 1
        self._run = self._run + 1 if voiced else 0
        if voiced:
            self._end = max(self._end, self._seen - min(_HANGOVER, self._run - 1))
        if self._begin is None:
            self._begin = self._onset()

    def _onset(self) -> int | None:
        """Return where speech begins, if enough of the last frames are voiced."""
        start = max(self._seen - _WINDOW, 0)
        recent = self._voiced[start : self._seen]
        return start + recent.index(True) if sum(recent) >= _ONSET else None

    def _start(self, begin: int) -> int:
        """Return the sample at which the clip of speech starts: as much silence as is kept before it."""
        lead = begin - self._lead
        start = lead if lead >= max(self._lead, 1) else 0
        while start < begin and self._power[start] < _DIGITAL:
            start += 1
        min_silent = 1 if start and self._power[start - 1] < _DIGITAL else self._rate // _DIGITAL_RUN
        start, stop = max(start * self._frame, self._given), (start + 1) * self._frame
        recorded = np.flatnonzero(np.square(self._samples[start:stop]) >= _DIGITAL)
        silent = int(recorded[0]) if len(recorded) else 0
        return start + silent if silent >= min_silent else start

    def _stop(self, begin: int, stop: int) -> int:
        """Return the sample at which the clip of speech stops: no later than a frame, and before digital silence."""
        while stop > begin + 1 and self._power[stop - 1] < _DIGITAL:
            stop -= 1
        return self._recorded_stop(begin, stop * self._frame)

    def _recorded_stop(self, begin: int, stop: int) -> int:
        """Return the sample behind the last that was recorded, if it is in the frame before `stop`."""
        start = max(begin * self._frame, self._given, stop - self._frame)
        recorded = np.flatnonzero(np.square(self._samples[start:stop]) >= _DIGITAL)
        silent = stop - start - 1 - int(recorded[-1]) if len(recorded) else 0
        behind = self._samples[stop : stop + self._frame]
        min_silent = 1 if len(behind) and np.square(behind).mean() < _DIGITAL else self._rate // _DIGITAL_RUN
        return stop - silent if silent >= min_silent else stop

    def _best_cut(self, begin: int) -> tuple[int, int]:
        """Return the frame at which speech ends before the best cut, and the frame to cut at."""
        silences = [*self._silences, (self._end, self._seen)]
        within = [(stop - start, start, stop) for start, stop in silences if start > begin]
        length, start, stop = max(within, default=(0, 0, 0))  # of equal ones the last
        if length >= _MIN_SILENCE:
            return start, (start + stop) // 2
        low = self._seen // 2
        power = np.convolve(self._power[low : self._seen], np.ones(_SMOOTH) / _SMOOTH, "valid")
        at = low + int(power.argmin()) + _SMOOTH // 2
        return at, at

    def _speech(self, end: int, stop: int) -> tuple[float, float] | None:
        """Return the seconds of the recording between which there is speech, of a clip that stops at a sample.

        Args:
            end: frame at which it ends.
        """
        if self._begin is None:
            return None
        # Where noise sets in with speech, the detector takes both; what ends quietly may be within its delay.
        end = min(end + _HANGOVER, stop // self._frame)
        power = np.array(self._power[self._begin : max(end, self._begin + 1)])
        noise = 2 * np.quantile(power, 0.1)
        loud = np.flatnonzero(power >= max(_QUIET * power.max(), noise if noise < _NOISE * power.max() else 0))
        begin, end = self._begin + loud[0], self._begin + loud[-1] + 1
        samples = max(int(begin) * self._frame, self._given), min(int(end) * self._frame, stop)
        return (self._first + samples[0]) / self._rate, (self._first + samples[1]) / self._rate

    def _cut_clip(self, stop: int, end: int | None = None) -> RecordedClip:
        """Cut off the clip of the samples before `stop`.

        Args:
            end: frame at which speech ends; None for a clip without speech.
        """
        speech = None if end is None else self._speech(end, stop)
        clip = RecordedClip(self._samples[self._given : stop].copy(), self._rate, self._first + self._given, speech)
        frames, self._given = divmod(stop, self._frame)
        self._first += frames * self._frame
        self._samples = self._samples[frames * self._frame :].copy()
        self._voiced, self._power = self._voiced[frames:], self._power[frames:]
        self._restart()
        return clip
