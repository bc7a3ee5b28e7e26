"""The stream: what it says of bad data, that it goes on exactly where it was, and that hosts share it."""

import contextlib
import functools
import json
import math
import shutil
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
from helpers.paths import TINY

from phi4mm_jax.config import Phi4MMConfig
from phi4mm_jax.data import pipeline
from phi4mm_jax.data.augment import SpeechAugmentation
from phi4mm_jax.data.examples import BadSample
from phi4mm_jax.data.packing import PackingConfig
from phi4mm_jax.data.pipeline import DataConfig, Source, TrainingData, measure_samples
from phi4mm_jax.data.sizing import Divisors, propose_packing
from phi4mm_jax.errors import InputError
from phi4mm_jax.processing.processor import Processor

INPUTS = TINY / "inputs"
TEXTS = PackingConfig(2, (64,), window=4)
MEDIA = PackingConfig(2, (1024,), crops=(4, 20), chunks=(2, 4), chunk_tokens=128, window=2)


OPENED = contextlib.ExitStack()  # streams of the test


@pytest.fixture(autouse=True)
def _streams_are_closed():
    with OPENED:
        yield


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.from_folder(TINY, Phi4MMConfig.from_folder(TINY))


def sample(name, words: int = 3, *media) -> dict:
    parts = [*media, {"type": "text", "text": "go " * words}]
    return {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": f"<{name}>"}]}


def image(name="image_0.png"):
    return {"type": "image", "image": str(INPUTS / name)}


def clip(name="audio_0.flac"):
    return {"type": "audio", "audio": str(INPUTS / name)}


def manifest(path: Path, samples) -> Source:
    lines = [s if isinstance(s, bytes) else json.dumps(s).encode() for s in samples]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return Source(str(path))


def texts(count: int, prefix="s"):
    rng = np.random.default_rng(0)
    return [sample(f"{prefix}{i}", int(rng.integers(1, 12))) for i in range(count)]


def mixed(count: int):
    media = [(), (), (image(),), (clip(),), (), (clip("audio_2.flac"), clip("audio_2.flac"))]
    return [sample(f"m{i}", 1 + i % 4, *media[i % len(media)]) for i in range(count)]


def stream(processor, *sources, packing=TEXTS, host=0, hosts=1, **options) -> TrainingData:
    options = {"threads": 2, **({} if "steps" in options else {"epochs": 1}), **options}
    data = TrainingData(DataConfig(tuple(sources), packing, **options), processor, host, hosts)
    OPENED.callback(data.close)
    return data


def answers(processor, batches) -> list[str]:
    """The names of the samples, in the order of the batches' rows."""
    found = []
    for b in batches:
        for targets, weights in zip(b.targets, b.weights, strict=True):
            text = processor.tokenizer.decode(targets[weights > 0])
            found += [name.strip("<>") for name in text.split("<|end|><|endoftext|>") if name]
    return found


def leaves(value):
    if value is None:
        return []
    return [leaf for item in value for leaf in leaves(item)] if isinstance(value, tuple) else [value]


def assert_same(one, other):
    ours, theirs = leaves(one), leaves(other)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_array_equal(a, b)


# ---------------------------------------------------------------------------------------------- order


def test_each_epoch_has_every_sample_once_in_another_order(tmp_path, processor):
    source = manifest(tmp_path / "m.jsonl", texts(50))
    packing = PackingConfig(1, (64,), pack=False)  # the order of batches is that of the stream
    found = answers(processor, stream(processor, source, packing=packing, epochs=3, seed=5))
    epochs = [found[i : i + 50] for i in range(0, 150, 50)]
    assert len(found) == 150
    everything = sorted(f"s{i}" for i in range(50))
    assert all(sorted(epoch) == everything for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert answers(processor, stream(processor, source, packing=packing, epochs=3, seed=5)) == found
    assert answers(processor, stream(processor, source, packing=packing, epochs=3, seed=6))[:50] != found[:50]
    plain = answers(processor, stream(processor, source, packing=packing, shuffle=False))
    assert plain == [f"s{i}" for i in range(50)]


def test_sources_without_weights_are_one(tmp_path, processor):
    sources = [manifest(tmp_path / f"{name}.jsonl", texts(n, name)) for name, n in (("a", 5), ("b", 30), ("c", 1))]
    found = answers(processor, stream(processor, *sources, epochs=2))
    assert Counter(found) == {f"{name}{i}": 2 for name, n in (("a", 5), ("b", 30), ("c", 1)) for i in range(n)}


def test_weights_are_shares_of_the_stream(tmp_path, processor):
    few, many = (manifest(tmp_path / f"{name}.jsonl", texts(n, name)) for name, n in (("a", 10), ("b", 90)))
    sources = Source(few.path, 3.0), Source(many.path, 1.0)
    counts = Counter(answers(processor, stream(processor, *sources)))
    of_few = [n for name, n in counts.items() if name[0] == "a"]
    assert sum(counts.values()) == 100
    assert sum(of_few) == 75
    assert set(of_few) <= {7, 8}  # passes over it, each whole
    assert max(n for name, n in counts.items() if name[0] == "b") == 1


def test_each_source_has_an_order_of_its_own(tmp_path, processor):
    sources = [Source(manifest(tmp_path / f"{name}.jsonl", texts(30, name)).path, 1.0) for name in "ab"]
    packing = PackingConfig(1, (64,), pack=False)
    found = answers(processor, stream(processor, *sources, packing=packing))
    orders = [[name[1:] for name in found if name[0] == source] for source in "ab"]
    assert len(orders[0]) == len(orders[1]) == 30
    assert orders[0] != orders[1]


def test_each_place_in_the_stream_is_augmented_anew(tmp_path, processor):
    """And otherwise with another seed."""
    source = manifest(tmp_path / "m.jsonl", [sample("a", 3, clip()), sample("a", 3, clip())])
    packing = PackingConfig(1, (1024,), pack=False, chunks=(2,), chunk_tokens=128)
    options = {"packing": packing, "epochs": 2, "augment_clip": "noise"}
    batches = [batch for seed in (1, 2) for batch in stream(processor, source, seed=seed, **options)]
    frames = {batch.batch.audio.frames.tobytes() for batch in batches}
    assert len(batches) == len(frames) == 8


def test_each_pass_over_a_weighted_source_has_another_order(tmp_path, processor):
    """Recounted by hand: 160 samples, three of four from a source of 10, which is gone through twelve times."""
    sources = [manifest(tmp_path / f"{name}.jsonl", texts(n, name)) for name, n in (("a", 10), ("b", 30))]
    weighted = Source(sources[0].path, 3.0), Source(sources[1].path, 1.0)
    packing = PackingConfig(1, (64,), pack=False)  # the order of batches is that of the stream
    found = answers(processor, stream(processor, *weighted, packing=packing, epochs=4))
    few, many = ([name for name in found if name[0] == source] for source in "ab")
    assert (len(few), len(many)) == (120, 40)
    passes = [few[i : i + 10] for i in range(0, 120, 10)]
    assert all(sorted(of_pass) == sorted(f"a{i}" for i in range(10)) for of_pass in passes)
    assert len({tuple(of_pass) for of_pass in passes}) == 12
    assert sorted(many[:30]) == sorted(f"b{i}" for i in range(30))
    assert len(set(many[30:])) == 10
    assert many[30:] != many[:10]
    shares = np.cumsum([name[0] == "a" for name in found]) / np.arange(1, 161)
    assert np.abs(shares[7:] - 0.75).max() < 0.1  # mixed throughout


def test_steps_repeat_the_data_until_their_number(tmp_path, processor):
    source = manifest(tmp_path / "m.jsonl", texts(7))
    batches = list(stream(processor, source, steps=40))
    assert len(batches) == 40
    assert set(answers(processor, batches)) == {f"s{i}" for i in range(7)}


def test_fewer_steps_than_were_taken_end_a_stream(tmp_path, processor):
    source = manifest(tmp_path / "m.jsonl", texts(7))
    before = stream(processor, source, steps=8)
    assert len(list(before)) == 8
    after = stream(processor, source, steps=5)
    after.set_state(before.get_state())
    assert after.count_remaining() == 0
    assert next(after, None) is None


def test_functions_of_any_kind_augment(tmp_path, processor):
    """A state names them: a partial by its function, an object by its class."""

    class Turned:
        def __call__(self, image, rng):
            return image

    source = manifest(tmp_path / "m.jsonl", texts(2))
    for function, name in ((functools.partial(stream, packing=None), "stream"), (Turned(), "Turned")):
        state = stream(processor, source, augment_image=function).get_state()
        assert name in json.dumps(state)


@pytest.mark.parametrize(
    ("speech", "reads"), [(None, 12), (SpeechAugmentation(speed=(0.8, 1.25)), 8 + 4 * 3)], ids=["plain", "drawn speed"]
)
def test_batches_are_counted_by_reading_each_sample_once(tmp_path, processor, monkeypatch, speech, reads):
    """All and the remaining ones, beside those that come; clips whose speed is drawn are read in each epoch."""
    source = manifest(tmp_path / "m.jsonl", mixed(12))
    batches = list(stream(processor, source, packing=MEDIA, epochs=3, augment_speech=speech))
    data = stream(processor, source, packing=MEDIA, epochs=3, augment_speech=speech)
    read, lock, shown = Counter(), threading.Lock(), []
    plain = pipeline.parse_sample

    def counted(values, *rest):
        with lock:
            read[values["messages"][-1]["content"]] += 1
        return plain(values, *rest)

    monkeypatch.setattr(pipeline, "parse_sample", counted)
    assert data.count_batches(lambda *seen: shown.append(seen)) == len(batches)
    assert (len(read), read.total()) == (12, reads)
    assert shown == sorted(shown)
    assert shown[-1] == (36, 36)
    taken = [next(data) for _ in range(len(batches) // 2)]
    read.clear()
    assert data.count_remaining() == len(batches) - len(taken)
    data.close()


def test_both_answers_of_a_preference_are_in_one_batch(tmp_path, processor):
    prompts = [{"messages": sample(i)["messages"][:1], "chosen": f"yes{i}", "rejected": f"no{i}"} for i in range(6)]
    source = manifest(tmp_path / "m.jsonl", prompts)
    for packing in (PackingConfig(4, (64,), pack=False), PackingConfig(2, (64,))):
        batches = list(stream(processor, source, packing=packing, kind="preferences"))
        found = answers(processor, batches)
        assert sorted(found[::2]) == [f"yes{i}" for i in range(6)]
        assert found[1::2] == [name.replace("yes", "no") for name in found[::2]]


@pytest.mark.parametrize(
    ("make", "count", "hosts", "steps"),
    [
        (texts, 3, 1, 2),
        (texts, 3, 2, 2),
        (texts, 20, 1, 10),
        (texts, 200, 2, 14),
        (mixed, 20, 2, 5),
    ],
)
def test_proposed_sizes_take_every_sample(tmp_path, processor, make, count, hosts, steps):
    """Plan orders that they were not proposed for, of several epochs; there are steps enough to learn from."""
    source = manifest(tmp_path / "m.jsonl", make(count))
    measured = measure_samples(DataConfig((Source(source.path, 1.0),), None, steps=1, threads=2), processor)
    assert len(measured) == count
    packing = propose_packing(measured, divisors=Divisors(2, hosts), context=processor.context)
    streams = [stream(processor, source, packing=packing, epochs=2, seed=7, host=h, hosts=hosts) for h in range(hosts)]
    parts = [list(data) for data in streams]
    found = Counter(name for part in parts for name in answers(processor, part))
    prefix = "s" if make is texts else "m"
    assert found == {f"{prefix}{i}": 2 for i in range(count)}
    assert len(parts[0]) >= steps


def test_clips_are_measured_at_their_slowest(tmp_path, processor):
    source = manifest(tmp_path / "m.jsonl", [sample("a", 3, clip())])
    samples, rate = soundfile.read(INPUTS / "audio_0.flac")
    assert rate == 16000
    for speech, speed in ((None, 1.0), (SpeechAugmentation(speed=(0.5, 2.0)), 0.5)):
        data = DataConfig((source,), None, steps=1, threads=1, augment_speech=speech)
        (size,) = measure_samples(data, processor)
        frames = (round(len(samples) / speed) - 400) // 160 + 1
        assert size.longest == math.ceil(frames / 8)


# ---------------------------------------------------------------------------------------------- going on


@pytest.mark.parametrize("packing", [MEDIA, PackingConfig(2, (256, 1024), pack=False, crops=(20,), chunks=(4,))])
def test_resuming_from_every_step_is_bitwise_identical(tmp_path, processor, packing):
    source = manifest(tmp_path / "m.jsonl", mixed(20))
    options = {"packing": packing, "epochs": 2, "augment_image": "jitter", "augment_clip": "noise"}
    whole = stream(processor, source, **options)
    states, batches = [whole.get_state()], []
    for batch in whole:
        batches.append(batch)
        states.append(whole.get_state())
    assert len(batches) > 5
    used = stream(processor, source, **options, prefetch=1)
    next(used)
    for step, state in enumerate(states):
        stored = json.loads(json.dumps(state))
        for again in (stream(processor, source, **options, prefetch=3), used):
            again.set_state(stored)
            assert again.get_state() == state
            rest = list(again) if step % 4 == 0 or step > len(batches) - 2 else [next(again)]
            assert len(rest) in (1, len(batches) - step)
            for ours, theirs in zip(rest, batches[step:], strict=False):
                assert_same(ours, theirs)


def test_augmented_speech_resumes_where_it_was(tmp_path, processor):
    """Samples of other lengths each epoch, all of which are there again after resuming."""
    speech = SpeechAugmentation((0.8, 1.25), (-1, 1), time_masks=1, frequency_masks=1)
    samples = [sample(f"c{i}", 2, clip(f"audio_{i % 2}.flac")) for i in range(4)]
    source = manifest(tmp_path / "m.jsonl", samples)
    alone = PackingConfig(1, (160,), pack=False, chunks=(4,))  # so that batches are as long as their sample
    options = {"packing": alone, "epochs": 3, "augment_speech": speech}
    whole = stream(processor, source, **options)
    batches = [next(whole)]
    state = json.loads(json.dumps(whole.get_state()))
    batches += list(whole)
    again = stream(processor, source, **options)
    again.set_state(state)
    rest = list(again)
    assert len(rest) == len(batches) - 1 == 11
    for ours, theirs in zip(rest, batches[1:], strict=True):
        assert_same(ours, theirs)
    assert Counter(answers(processor, batches)) == {f"c{i}": 3 for i in range(4)}
    assert len({int(b.batch.lengths[0]) for b in batches}) > 4  # of two clips


def test_resuming_with_the_data_in_another_folder(tmp_path, processor):
    """Manifest and media together, which it names by paths relative to it: the batches are those it would have had."""
    media = [{"type": "image", "image": "media/i.png"}, {"type": "audio", "audio": "media/c.flac"}]
    (tmp_path / "here" / "media").mkdir(parents=True)
    shutil.copy(INPUTS / "image_0.png", tmp_path / "here" / "media" / "i.png")
    shutil.copy(INPUTS / "audio_0.flac", tmp_path / "here" / "media" / "c.flac")
    samples = [sample(f"s{i}", 1 + i % 5, *([media[i % 2]] if i % 3 else [])) for i in range(12)]
    source = manifest(tmp_path / "here" / "m.jsonl", samples)
    batches = list(stream(processor, source, packing=MEDIA, epochs=2))
    begun = stream(processor, source, packing=MEDIA, epochs=2)
    first = [next(begun) for _ in range(2)]
    state = json.loads(json.dumps(begun.get_state()))
    begun.close()
    (tmp_path / "there").mkdir()
    shutil.move(tmp_path / "here", tmp_path / "there" / "moved")
    again = stream(processor, Source(str(tmp_path / "there" / "moved" / "m.jsonl")), packing=MEDIA, epochs=2)
    again.set_state(state)
    rest = list(again)
    assert len(rest) > 2
    assert len(batches) == 2 + len(rest)
    for ours, theirs in zip([*first, *rest], batches, strict=True):
        assert_same(ours, theirs)


def test_an_epoch_may_be_added(tmp_path, processor):
    source = manifest(tmp_path / "m.jsonl", texts(9))
    one = stream(processor, source)
    first = answers(processor, one)
    two = stream(processor, source, epochs=2)
    two.set_state(one.get_state())
    assert sorted(answers(processor, two)) == sorted(first)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 2}, "seed was 0 and is 2"),
        ({"packing": MEDIA}, "packing was"),
        ({"augment_speech": SpeechAugmentation((0.9, 1.1))}, "augment_speech was None and is"),
        ({"augment_clip": "noise"}, "augment_clip was None and is 'noise'"),
        ({"source": texts(8)}, "samples was .9. and is .8."),
    ],
)
def test_a_state_of_other_data_is_refused(tmp_path, processor, change, named):
    state = stream(processor, manifest(tmp_path / "m.jsonl", texts(9))).get_state()
    source = manifest(tmp_path / "m.jsonl", change.pop("source", texts(9)))
    with pytest.raises(InputError, match=f"the state is of other data: {named}"):
        stream(processor, source, **change).set_state(state)


# ---------------------------------------------------------------------------------------------- hosts


@pytest.mark.parametrize("packing", [
    PackingConfig(4, (1024,), crops=(8, 40), chunks=(4, 8), chunk_tokens=128, window=2),
    PackingConfig(4, (256, 1024), pack=False, crops=(8, 40), chunks=(4, 8), chunk_tokens=128, window=2),
])  # fmt: skip
def test_hosts_share_the_batches(tmp_path, processor, packing):
    """As many batches of the same shapes, and together every sample once; the state is one."""
    source = manifest(tmp_path / "m.jsonl", mixed(20))
    streams = [stream(processor, source, packing=packing, host=host, hosts=2) for host in range(2)]
    batches = [list(data) for data in streams]
    assert len(batches[0]) == len(batches[1])
    for one, other in zip(*batches, strict=True):
        assert [x.shape for x in leaves(one)] == [x.shape for x in leaves(other)]
        assert len(one.batch.tokens) == packing.rows * (1024 // one.batch.tokens.shape[1]) // 2
    found = [answers(processor, b) for b in batches]
    assert all(found)
    assert sorted(found[0] + found[1]) == sorted(f"m{i}" for i in range(20))
    assert streams[0].get_state() == streams[1].get_state()


@pytest.mark.parametrize("before", [1, 2])
def test_a_stream_resumes_with_other_hosts(tmp_path, processor, before):
    """Batches of texts are those of one host; of all samples, media among them, each comes once."""
    packing = PackingConfig(4, (64,), window=2)
    source = manifest(tmp_path / "m.jsonl", texts(60))
    whole = list(stream(processor, source, packing=packing))

    def joined(streams):
        parts = [[next(data) for _ in range(2)] for data in streams]
        return [
            [np.concatenate(x) for x in zip(*map(leaves, batches), strict=True)] for batches in zip(*parts, strict=True)
        ]

    first = [stream(processor, source, packing=packing, host=i, hosts=before) for i in range(before)]
    batches = joined(first)
    rest = [stream(processor, source, packing=packing, host=i, hosts=4) for i in range(4)]
    for data in rest:
        data.set_state(json.loads(json.dumps(first[0].get_state())))
    for ours, theirs in zip([*batches, *joined(rest)], whole[:4], strict=True):
        for one, other in zip(ours, leaves(theirs), strict=True):
            np.testing.assert_array_equal(one, other)


def test_media_are_shared_by_other_hosts(tmp_path, processor):
    source = manifest(tmp_path / "m.jsonl", mixed(20))
    packing = PackingConfig(4, (1024,), crops=(40,), chunks=(8,), chunk_tokens=128, window=2)
    one = stream(processor, source, packing=packing)
    first = answers(processor, [next(one)])
    rest = [stream(processor, source, packing=packing, host=i, hosts=2) for i in range(2)]
    found = list(first)
    for data in rest:
        data.set_state(one.get_state())
        found += answers(processor, data)
    assert 0 < len(first) < 20
    assert sorted(found) == sorted(f"m{i}" for i in range(20))


def test_batches_of_a_run_have_the_same_structure(tmp_path, processor):
    """Stacks are there, and empty, where a batch has no such media."""
    batches = list(stream(processor, manifest(tmp_path / "m.jsonl", texts(20)), packing=MEDIA))
    for b in batches:
        assert (len(b.batch.images.crops), len(b.batch.audio.frames)) == (4, 2)
        assert not b.batch.images.patch_mask.any()
        assert not b.batch.audio.attended.any()


# ---------------------------------------------------------------------------------------------- bad data


def damaged(tmp_path: Path) -> Path:
    """A header that is right, and half of the pixels."""
    content = (INPUTS / "image_0.png").read_bytes()
    path = tmp_path / "damaged.png"
    path.write_bytes(content[: len(content) // 2])
    return path


BAD = {
    "broken line": (b'{"messages": [', "line", "the line is not JSON"),
    "not UTF-8": (b'{"messages": "\xff"}', "line", "the line is not UTF-8 .at byte 14"),
    "no object": (b"3", "line", "the sample is a int"),
    "no messages": ({"message": []}, "messages", "messages is missing"),
    "empty answer": ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}]}, "answer",
                     "answer 1 is empty"),
    "no answer": ({"messages": [{"role": "user", "content": "x"}]}, "answer", "messages have no answer"),
    "missing file": (sample("x", 1, image("none.png")), "media", "none.png.*the file does not exist"),
    "no image": (sample("x", 1, {"type": "image", "image": str(INPUTS / "audio_0.flac")}), "media", "image 1"),
    "longer than a row": (sample("x", 2000), "length",
                          r"the sample has \d+ tokens .text: \d+., but the row length is 1024, which would cut"),
    "too many crops": (sample("x", 1, image("image_3.png")), "length", "crops, which exceeds .* 20|row length is 1024"),
    "too long a clip": (sample("x", 1, clip("audio_4.flac")), "length", "a clip has 500 tokens|chunks"),
}  # fmt: skip


@pytest.mark.parametrize(("bad", "cause", "message"), BAD.values(), ids=BAD)
def test_bad_samples_name_file_and_line(tmp_path, processor, bad, cause, message):
    source = manifest(tmp_path / "m.jsonl", [*texts(3), b"", bad, *texts(3)])
    data = stream(processor, source, packing=MEDIA)
    with pytest.raises(BadSample, match=f"m.jsonl: line 5: .*({message})") as caught:
        list(data)
    assert caught.value.cause == cause


def test_media_that_only_decoding_shows_to_be_bad_are_named(tmp_path, processor):
    bad = sample("x", 1, {"type": "image", "image": str(damaged(tmp_path))})
    source = manifest(tmp_path / "m.jsonl", [*texts(30), bad, *texts(30), bad, *texts(3)])
    with pytest.raises(BadSample, match=r"m.jsonl: line (31|62): image 1 .*cannot be decoded") as caught:
        list(stream(processor, source, packing=MEDIA))
    assert caught.value.cause == "media"
    data = stream(processor, source, packing=MEDIA, bad_samples=0.1)
    assert sorted(answers(processor, data)) == sorted(answers(processor, stream(processor, manifest(
        tmp_path / "good.jsonl", [*texts(30), *texts(30), *texts(3)]), packing=MEDIA)))  # fmt: skip
    assert data.skipped == {"media": 2}  # in different batches


def test_some_bad_samples_may_be_skipped(tmp_path, processor):
    """They are counted by cause, also across a stop; all others come once."""
    bad = [b"oops", b"{}", sample("x", 1, image("none.png")), sample("x", 2000), b"[]"]
    good = texts(60)
    lines = [line for i, g in enumerate(good) for line in ([bad[i // 12], g] if i % 12 == 5 else [g])]
    source = manifest(tmp_path / "m.jsonl", lines)
    data = stream(processor, source, packing=MEDIA, bad_samples=0.1)
    states, batches = [], []
    for batch in data:
        batches.append(batch)
        states.append((data.get_state(), data.skipped))
    assert sorted(answers(processor, batches)) == sorted(f"s{i}" for i in range(60))
    assert data.skipped == {"line": 2, "messages": 1, "media": 1, "length": 1}
    for state, skipped in states:
        again = stream(processor, source, packing=MEDIA, bad_samples=0.1)
        again.set_state(state)
        assert again.skipped == skipped
        list(again)
        assert again.skipped == data.skipped


def test_too_many_bad_samples_end_the_run(tmp_path, processor):
    lines = [b"oops" if i % 10 == 9 else g for i, g in enumerate(texts(300))]
    source = manifest(tmp_path / "m.jsonl", lines)
    assert len(answers(processor, stream(processor, source, bad_samples=0.1, shuffle=False))) == 270
    with pytest.raises(InputError, match=r"\d+ of 1\d\d samples are unusable .line: \d+., more than the fraction 0.05"):
        list(stream(processor, source, bad_samples=0.05, shuffle=False))


def test_few_samples_are_judged_at_the_end_of_an_epoch(tmp_path, processor):
    source = manifest(tmp_path / "m.jsonl", [b"oops", *texts(19)])
    assert len(answers(processor, stream(processor, source, bad_samples=0.05, shuffle=False))) == 19
    with pytest.raises(InputError, match=r"1 of 20 samples are unusable .*The last one: .*m.jsonl: line 1: the line"):
        list(stream(processor, source, bad_samples=0.04, shuffle=False, steps=1000))


def test_nothing_but_bad_samples_ends_the_run(tmp_path, processor):
    source = manifest(tmp_path / "m.jsonl", [b"oops"] * 3)
    with pytest.raises(InputError, match="3 of 3 samples are unusable"):
        next(stream(processor, source, bad_samples=0.9, steps=10))


# ---------------------------------------------------------------------------------------------- sources


def test_lines_are_read_with_any_ends(tmp_path, processor):
    """A byte order mark, empty lines, Windows line ends, no end of the last line; paths relative to the file."""
    shutil.copy(INPUTS / "image_0.png", tmp_path / "here.png")
    lines = [json.dumps(s).encode() for s in (*texts(3), sample("i", 1, {"type": "image", "image": "here.png"}))]
    (tmp_path / "m.jsonl").write_bytes(
        b"\xef\xbb\xbf" + lines[0] + b"\r\n\n\r\n" + b" " * 20 + b"\n" + b"\n".join(lines[1:])
    )
    found = answers(processor, stream(processor, Source(str(tmp_path / "m.jsonl")), packing=MEDIA))
    assert sorted(found) == ["i", "s0", "s1", "s2"]


def test_tables_are_the_same_stream(tmp_path, processor):
    """Parquet in several row groups, a dataset of the Hub's library, and media as their columns have it."""
    import datasets
    import pyarrow
    from pyarrow import parquet

    rows = [{"id": i, "messages": s["messages"]} for i, s in enumerate(mixed(9))]
    content = (INPUTS / "image_0.png").read_bytes()
    for row in rows:
        for message in row["messages"]:
            if isinstance(message["content"], str):
                message["content"] = [{"type": "text", "text": message["content"]}]
            for part in message["content"]:
                if part["type"] == "image":
                    part["image"] = {"bytes": content, "path": None}
                if part["type"] == "audio":
                    part["audio"] = {"bytes": None, "path": part["audio"]}
    table = pyarrow.Table.from_pylist(rows)
    parquet.write_table(table, tmp_path / "m.parquet", row_group_size=2)
    datasets.Dataset(table).save_to_disk(str(tmp_path / "dataset"))
    strings = [{"messages": json.dumps(s["messages"])} for s in mixed(9)]
    parquet.write_table(pyarrow.Table.from_pylist(strings), tmp_path / "strings.parquet")
    lines = list(stream(processor, manifest(tmp_path / "m.jsonl", mixed(9)), packing=MEDIA))
    for name in ("m.parquet", "dataset", "strings.parquet"):
        found = list(stream(processor, Source(str(tmp_path / name)), packing=MEDIA))
        assert len(found) == len(lines)
        for ours, theirs in zip(found, lines, strict=True):
            assert_same(ours, theirs)


def test_sources_that_cannot_be_opened_are_named(tmp_path, processor, monkeypatch):
    (tmp_path / "empty.jsonl").write_bytes(b"\n\n")
    (tmp_path / "broken.parquet").write_bytes(b"no")
    (tmp_path / "folder").mkdir()
    for name, message in (
        ("none.jsonl", "none.jsonl: cannot be read .No such file"),
        ("empty.jsonl", "empty.jsonl: has no samples"),
        ("broken.parquet", "broken.parquet: is not a Parquet file"),
        ("folder", "folder: is not a dataset"),
    ):
        with pytest.raises(InputError, match=message):
            stream(processor, Source(str(tmp_path / name)))
    for module, name in (("pyarrow", "broken.parquet"), ("datasets", "folder")):
        monkeypatch.setitem(__import__("sys").modules, module, None)
        with pytest.raises(InputError, match=f"needs {module}; pip install {module}"):
            stream(processor, Source(str(tmp_path / name)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": None}, "epochs is None and steps is None; give one"),
        ({"epochs": 1, "steps": 1}, "give one"),
        ({"epochs": 0}, "epochs is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"bad_samples": 1.0}, "bad_samples is 1.0"),
        ({"max_crops": 0}, "max_crops is 0; expected the largest number of crops"),
        ({"kind": "dpo"}, "kind is 'dpo'"),
        ({"augment_image": "blur"}, "augment_image is 'blur'; expected jitter"),
        ({"hosts": 2, "host": 2}, "host 2 of 2"),
        ({"packing": PackingConfig(1, (1 << 20,))}, "beyond the model's context"),
        ({"packing": None}, "packing is None"),
        ({"packing": PackingConfig(3, (64,)), "hosts": 2}, "rows is 3"),
    ],
)
def test_settings_are_checked(tmp_path, processor, options, message):
    with pytest.raises(InputError, match=message):
        stream(processor, manifest(tmp_path / "m.jsonl", texts(2)), **options)


def test_weights_are_for_all_or_none(processor):
    for weights, message in (((1.0, None), "others none"), ((1.0, 0.0), "its weight is 0.0")):
        with pytest.raises(InputError, match=message):
            stream(processor, *(Source("a", w) for w in weights))
