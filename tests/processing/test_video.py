"""Video: which frames are chosen, from files, folders and lists, and what becomes of them in a prompt."""

import base64
import copy
import dataclasses
import io
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from phi4mm_jax import InputError
from phi4mm_jax.data.examples import parse_sample
from phi4mm_jax.engine import EngineConfig, Request
from phi4mm_jax.processing import containers
from phi4mm_jax.processing.audio import load_audio
from phi4mm_jax.processing.images import load_image, preprocess_image
from phi4mm_jax.processing.sources import Deadline
from phi4mm_jax.processing.video import (
    crops_per_frame,
    evenly_spaced,
    video_frames,
)

WIDTH, HEIGHT = 96, 64
RATE = 10
BITS = 12


def picture(number: int) -> np.ndarray:
    """A number in black and white squares, 6 a row."""
    bits = np.array([number >> k & 1 for k in range(BITS)], np.uint8).reshape(2, 6)
    grey = np.kron(255 * bits, np.ones((HEIGHT // 2, WIDTH // 6), np.uint8))
    return np.repeat(grey[:, :, None], 3, 2)


def number_of(image: Image.Image) -> int:
    grey = np.asarray(image.convert("L"))
    bits = grey[HEIGHT // 4 :: HEIGHT // 2, WIDTH // 12 :: WIDTH // 6].ravel() > 128
    return int((bits << np.arange(BITS)).sum())


def numbers(frames: list[Image.Image]) -> list[int]:
    return [number_of(frame) for frame in frames]


def made(
    count: int, container: str = "mp4", codec: str = "mpeg4", times: list[int] | None = None, turned: float = 0
) -> bytes:
    """A video that counts; the times are in tenths of a second."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as file:
        stream: Any = file.add_stream(codec, rate=RATE)
        stream.width, stream.height, stream.pix_fmt, stream.codec_context.gop_size = WIDTH, HEIGHT, "yuv420p", 20
        if turned:
            stream.set_display_rotation(turned)
        for i in range(count):
            frame = av.VideoFrame.from_ndarray(picture(i), format="rgb24")
            frame.pts = times[i] if times else i
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return buffer.getvalue()


# Files


@pytest.mark.parametrize(
    ("container", "codec"),
    [("mp4", "mpeg4"), ("mp4", "libx264"), ("webm", "libvpx"), ("mpegts", "mpeg2video"), ("avi", "mpeg4")],
)
def test_frames_are_evenly_spaced(container: str, codec: str):
    """The middle of each part. 60 s have to be searched, 3 s are decoded as they come."""
    for count in (30, 600):
        data = made(count, container, codec)
        for frames in (1, 2, 7, 16):
            expected = [int((i + 0.5) * count / frames) for i in range(frames)]
            assert numbers(video_frames(data, frames)) == expected, (count, frames)


def test_a_clip_of_few_frames_gives_each_once():
    assert numbers(video_frames(made(5))) == [0, 1, 2, 3, 4]
    assert numbers(video_frames(made(1))) == [0]
    assert len(video_frames(made(300))) == 64


def test_frames_are_spaced_by_time_and_not_by_number():
    """One frame for nine seconds, then ten within one: most of the time shows the first."""
    data = made(11, times=[0, *range(90, 100)])
    assert numbers(video_frames(data, 5)) == [0, 1]  # at 1, 3, 5 and 7 s number 0, at 9 s number 1
    assert numbers(video_frames(data, 10)) == [0, 6]  # at 0.5, ..., 8.5 s number 0, at 9.5 s number 6


def test_frames_are_read_from_paths_bytes_and_open_files(tmp_path: Path):
    data = made(30)
    path = tmp_path / "http:clip|1.bin"  # known by its content; a name is not a URL
    path.write_bytes(data)
    with path.open("rb") as file:
        for source in (path, str(path), data, bytearray(data), file):
            assert numbers(video_frames(source, 3)) == [5, 15, 25]


def test_frames_are_turned_as_a_player_turns_them():
    (upright,) = video_frames(made(10, turned=90), 1)
    assert upright.size == (HEIGHT, WIDTH)
    assert number_of(upright.rotate(-90, expand=True)) == 5


def test_a_video_whose_header_lacks_the_length_is_read_through():
    """As recorders write it to a pipe."""

    class Pipe(io.RawIOBase):
        def __init__(self):
            super().__init__()
            self.data = b""

        def write(self, data: Any) -> int:
            self.data += bytes(data)
            return len(data)

        def seekable(self) -> bool:
            return False

        def writable(self) -> bool:
            return True

    pipe = Pipe()
    whole = made(600, "webm", "libvpx")
    source: Any = av.open(io.BytesIO(whole))
    with source, av.open(pipe, "w", format="webm", options={"live": "1"}) as target:
        out: Any = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = out
                target.mux(packet)
    written: Any = av.open(io.BytesIO(pipe.data))
    with written:
        assert written.duration is None
    assert numbers(video_frames(pipe.data, 4)) == [75, 225, 375, 525]


class Container:
    """A file as PyAV opens it. Its packets are counted; it may refuse to be searched."""

    packets = 0

    def __init__(self, opened: Any, can_seek: bool):
        self._opened, self._can_seek = opened, can_seek

    def __getattr__(self, name: str) -> Any:
        return getattr(self._opened, name)

    def __enter__(self) -> "Container":
        return self

    def __exit__(self, *_: Any) -> None:
        self._opened.close()

    def seek(self, *arguments: Any, **options: Any) -> None:
        if not self._can_seek:
            raise av.PermissionError(1, "cannot seek")
        self._opened.seek(*arguments, **options)

    def demux(self, *streams: Any) -> Iterator[Any]:
        for packet in self._opened.demux(*streams):
            Container.packets += 1
            yield packet


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Have PyAV open files as `Container`s that can be searched, or not."""
    av_open = av.open
    monkeypatch.setattr(Container, "packets", 0)
    return lambda can_seek: monkeypatch.setattr(av, "open", lambda *a, **k: Container(av_open(*a, **k), can_seek))


def test_a_file_that_cannot_be_searched_is_read_through(opened: Callable[[bool], None]):
    data = made(600)
    opened(False)
    assert numbers(video_frames(data, 4)) == [75, 225, 375, 525]
    assert Container.packets >= 525


def test_only_what_is_near_a_frame_is_decoded(opened: Callable[[bool], None]):
    """Of 3000 frames 4 are wanted; a key frame is at most 20 before each."""
    data = made(3000)
    opened(True)
    assert numbers(video_frames(data, 4)) == [375, 1125, 1875, 2625]
    assert 4 < Container.packets < 4 * 25


# Sizes


def detailed(width: int, height: int, number: int) -> np.ndarray:
    """Something with details, which differs from frame to frame."""
    rng = np.random.default_rng(number)
    small = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def large(count: int, width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as file:
        stream: Any = file.add_stream("mpeg4", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for i in range(count):
            frame = av.VideoFrame.from_ndarray(detailed(width, height, i % 3), format="rgb24")
            frame.pts = i
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("count", "frames", "size"), [(3, 64, (3200, 1800)), (12, 12, (904, 1208)), (1, 1, (3200, 1800))]
)
def test_shrunk_frames_are_seen_as_whole_ones(count: int, frames: int, size: tuple[int, int]):
    """The model's crops are to the last bit those of the frames at their full size, whose number is known only when
    all are decoded."""
    data = large(count, *size)
    source: Any = av.open(io.BytesIO(data))
    with source as file:
        whole = [frame.to_image() for frame in file.decode(video=0)]
    crops = min(crops_per_frame(count), 36)
    shrunk = video_frames(data, frames)
    assert len(shrunk) == count
    for a, b in zip(shrunk, whole, strict=True):
        assert a.width < b.width
        seen, expected = preprocess_image(a, crops), preprocess_image(b, crops)
        for name in ("crops", "patch_mask", "layout"):
            np.testing.assert_array_equal(getattr(seen, name), getattr(expected, name))


@pytest.mark.parametrize("crop_size", [224, 672])
def test_frames_are_shrunk_for_the_crops_of_the_checkpoint(tiny, crop_size: int, tmp_path: Path):
    """Of a file and of a list; in a chat as in a training sample."""
    processor = copy.copy(tiny.processor)
    vision = dataclasses.replace(tiny.config.vision, crop_size=crop_size)
    processor.config = dataclasses.replace(tiny.config, vision=vision)
    whole = Image.fromarray(detailed(1600, 904, 0))
    whole.save(tmp_path / "whole.png")
    expected = preprocess_image(whole, 3, crop_size, 14)
    messages = chat({"video": [str(tmp_path / "whole.png")], "max_crops": 3})
    answered = [*messages, {"role": "assistant", "content": "Noise."}]
    sample = parse_sample({"messages": answered}, tmp_path, processor.tokenizer, crop_size=crop_size)
    for row in (processor.row(messages), processor.row_of(sample.prompt)):
        np.testing.assert_array_equal(row.images[0].crops, expected.crops)
        np.testing.assert_array_equal(row.images[0].layout, expected.layout)
    frames = {size: video_frames(large(1, 1600, 904), 1, 3, size)[0].size for size in (448, crop_size)}
    assert frames[crop_size] == pytest.approx([n * crop_size / 448 for n in frames[448]], abs=1)


def resident() -> float:
    """MiB of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


def test_memory_is_bounded_by_the_frames_kept():
    """64 frames of 1536 x 1536 take 576 MiB in Pillow, and what is seen of them 49."""
    data = large(64, 1536, 1536)
    video_frames(data, 1)  # what libraries take once
    before = resident()
    frames = video_frames(data)
    assert [frame.size for frame in frames] == [(448, 448)] * 64
    assert resident() - before < 200


def test_too_many_pixels_are_refused(monkeypatch: pytest.MonkeyPatch):
    """Before a frame is decoded, by FFmpeg itself, and by what the container says."""
    data = made(10)
    monkeypatch.setattr("phi4mm_jax.processing.video.MAX_PIXELS", WIDTH * HEIGHT - 1)
    with pytest.raises(InputError, match="the video has 96x64 pixels, more than 6143; shrink it"):
        video_frames(data)
    monkeypatch.setattr(containers, "MAX_PIXELS", WIDTH * HEIGHT - 1)
    with pytest.raises(InputError, match="frames have no size, or more than 6143 pixels; shrink it"):
        video_frames(data)


def test_decoding_takes_no_longer_than_the_limit(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Deadline.__init__, "__defaults__", (-1,))
    with pytest.raises(InputError, match=r"decoding the video takes longer than -1 seconds; pass a shorter one"):
        video_frames(made(30))


# Folders and lists


def test_a_folder_is_read_in_natural_order(tmp_path: Path):
    for n in range(12):
        Image.fromarray(picture(n)).save(tmp_path / f"frame_{n}.png")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / ".hidden.png").write_bytes(b"")
    assert numbers(video_frames(tmp_path)) == list(range(12))
    assert numbers(video_frames(str(tmp_path), 3)) == [2, 6, 10]


def test_a_list_of_images_is_spaced_evenly(tmp_path: Path):
    path = tmp_path / "a.png"
    Image.fromarray(picture(2)).save(path)
    frames = [picture(0), Image.fromarray(picture(1)), path, path.read_bytes()]
    assert numbers(video_frames(frames)) == [0, 1, 2, 2]
    assert numbers(video_frames([picture(n) for n in range(200)], 4)) == [25, 75, 125, 175]
    assert numbers(video_frames([None, picture(7), None], 1)) == [7]  # what is not chosen is not opened


def test_chosen_frames_are_in_the_middle_of_equal_parts():
    assert evenly_spaced(5, 64) == [0, 1, 2, 3, 4]
    for total in (64, 65, 100, 1000):
        chosen = evenly_spaced(total, 64)
        assert len(chosen) == 64
        assert chosen == [int((i + 0.5) * total / 64) for i in range(64)]


# What cannot be used


def sound() -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="wav") as file:
        stream = file.add_stream("pcm_s16le", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1600), np.int16), format="s16", layout="mono")
        frame.sample_rate = 16000
        file.mux(stream.encode(frame))  # type: ignore[arg-type]
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.mp4", "the file does not exist"),
        (b"", "the file is empty"),
        (b"no video" * 100, "the video cannot be read"),
        (sound(), "the file has no video"),
        ([], "the video is an empty list"),
        ([b"no image"], r"frame 1 \(8 bytes\): the file is in no format"),
        (7, "the video is of type int"),
        (b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n", "the video cannot be read"),
    ],
)
def test_unusable_sources_are_named(source: Any, message: str):
    with pytest.raises(InputError, match=message):
        video_frames(source)


def image(form: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20)).save(buffer, form)
    return buffer.getvalue()


@pytest.mark.parametrize("is_installed", [True, False], ids=["PyAV", "no PyAV"])
@pytest.mark.parametrize(
    ("load", "content", "message"),
    [
        (load_audio, image("JPEG"), "the file has no audio: it is a JPEG image; give it as an image"),
        (load_audio, image("GIF"), "the file has no audio: it is a GIF image; give it as an image"),
        (load_image, sound(), "in no format that Pillow reads: it is a WAV sound; give it as audio"),
        (
            load_image,
            b"version https://git-lfs.github.com/spec/v1\n",
            "it is a pointer of Git LFS, in place of the file",
        ),
        (load_image, b"\0\0\0\x20ftypisom" + b"\0" * 40, "it is an MP4 video; give it as a video"),
        (video_frames, image("PNG"), "the file has no video: it is a PNG image; give it as an image"),
        (video_frames, b"%PDF-1.7\n" + b"x" * 99, "the file has no video: it is a PDF document; give a medium itself"),
    ],
)
def test_a_file_of_another_kind_is_named(load, content, message, is_installed, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", av if is_installed else None)
    (tmp_path / "file").write_bytes(content)
    for source in (content, tmp_path / "file"):
        with pytest.raises(InputError, match=re.escape(message)):
            load(source)


@pytest.mark.parametrize("load", [load_audio, load_image, video_frames])
def test_an_empty_file_is_named_empty(load, tmp_path):
    (tmp_path / "a.jpg").touch()
    with pytest.raises(InputError, match="the file is empty; pass a whole one"):
        load(tmp_path / "a.jpg")


def test_a_folder_without_images_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match="has no images"):
        video_frames(tmp_path)


def test_a_file_that_is_cut_off_is_refused():
    with pytest.raises(InputError, match="the video cannot be read"):
        video_frames(made(600)[:5000])


@pytest.mark.parametrize("frames", [0, -1, 65, 1.5, True, None])
def test_unusable_numbers_of_frames_are_refused(frames: Any):
    with pytest.raises(InputError, match=f"frames is {frames!r}; expected 1 to 64"):
        video_frames([picture(0)], frames)


def test_missing_pyav_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(InputError, match=r"pip install '\.\[video\]'"):
        video_frames(b"anything")
    assert len(video_frames([picture(0)])) == 1


def test_playlists_open_nothing(tmp_path: Path):
    """Bytes from elsewhere must not name files of this machine."""
    (tmp_path / "clip.ts").write_bytes(made(10, "mpegts", "mpeg2video"))
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{tmp_path}/clip.ts\n#EXT-X-ENDLIST\n".encode()
    with pytest.raises(InputError, match="the video cannot be read"):
        video_frames(playlist)


# Prompts


def chat(part: dict[str, Any]) -> list[dict[str, Any]]:
    text = {"type": "text", "text": "What happens?"}
    return [{"role": "user", "content": [{"type": "video", **part}, text]}]


def test_a_video_is_as_many_images(tiny, tmp_path: Path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(made(30))
    image = {"type": "image", "image": Image.new("RGB", (500, 500))}
    (message,) = chat({"video": str(path), "frames": 3, "max_crops": 1})
    message["content"].insert(0, image)
    row = tiny.processor.row([message])
    frames = video_frames(path, 3)
    assert [medium.index for medium, _ in row.media] == [0, 1, 2, 3]
    assert [len(f.crops) for f in row.images] == [5, 2, 2, 2]  # an image keeps its own crops

    raw = "<|user|><|image_1|><|image_2|><|image_3|><|image_4|>What happens?<|end|><|assistant|>"
    same = tiny.processor.row(raw, [image["image"], *frames])
    np.testing.assert_array_equal(row.tokens, same.tokens)
    per_frame = tiny.processor.count_image_tokens(frames[0], 1)
    assert per_frame == 273 + (16 * HEIGHT // WIDTH + 1) * 17
    starts = [start for _, start in row.media]
    assert np.diff(starts).tolist() == [row.images[0].num_tokens, per_frame, per_frame]


def test_the_frames_share_the_crops(tiny):
    assert [crops_per_frame(n) for n in (1, 2, 16, 40, 64)] == [64, 32, 4, 1, 1]
    big = np.zeros((900, 900, 3), np.uint8)
    for part, expected in (
        ({"video": [big] * 16}, [1 + 4] * 16),
        ({"video": [big] * 2}, [1 + 9] * 2),  # as at its own size
        ({"video": [big] * 16, "max_crops": 1}, [1 + 1] * 16),
        ({"video": [big] * 64}, [1 + 1] * 64),
    ):
        assert [len(f.crops) for f in tiny.processor.row(chat(part)).images] == expected


def test_a_clip_costs_no_more_than_its_crops(tiny):
    """34,880 tokens, whatever its shape and its number of frames."""
    for count in (1, 2, 5, 16, 33, 64):
        for size in ((4000, 4000), (1920, 1080), (500, 3000)):
            frame = Image.new("1", size)
            assert count * tiny.processor.count_image_tokens(frame, crops_per_frame(count)) <= 64 * 545


def test_the_engine_answers_about_videos_as_generate(tiny):
    messages = chat({"video": made(30), "frames": 2})
    (expected,) = tiny.generate([messages], max_new_tokens=3)
    assert expected.prompt_tokens == len(tiny.processor.row(messages).tokens)
    engine = tiny.engine(EngineConfig(slots=1, cache_tokens=1024))
    ((_, completion),) = engine.run([Request(messages, max_new_tokens=3)])
    assert completion == expected
    data_url = "data:video/mp4;base64," + base64.b64encode(made(30)).decode()
    (completion,) = tiny.generate([chat({"video": data_url, "frames": 2})], max_new_tokens=3)
    assert completion.tokens == expected.tokens


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({}, r"\.video is missing"),
        ({"video": None}, r"\.video is NoneType"),
        ({"video": "nowhere.mp4"}, r"\.video: the file does not exist"),
        ({"video": "https://a.b/c.mp4"}, r"\.video is .*nothing is downloaded"),
        ({"video": [picture(0)], "frames": 0}, r"\.video: frames is 0"),
        ({"video": [picture(0)], "max_crops": 0}, r"\.max_crops is 0"),
        ({"video": [picture(0)], "fps": 2}, r"\.fps: a part of type video has only"),
    ],
)
def test_bad_parts_are_named_by_message_and_place(tiny, part: dict[str, Any], message: str):
    with pytest.raises(InputError, match=r"messages\[0\]\.content\[0\]" + message):
        tiny.processor.row(chat(part))
