"""Batches: every sample once, within its place and all capacities, and what follows each token is its sample's own."""

import itertools

import numpy as np
import pytest
from helpers.paths import TINY

from phi4mm_jax.batch import NO_MEDIA
from phi4mm_jax.config import Phi4MMConfig
from phi4mm_jax.data.examples import BadSample, Example, Size
from phi4mm_jax.data.packing import PackingConfig, PendingSample, Planner, build_batch
from phi4mm_jax.data.sizing import Divisors, check_reached, propose_packing, propose_trainable
from phi4mm_jax.errors import InputError
from phi4mm_jax.processing.batching import Outline, Row, num_chunks
from phi4mm_jax.processing.images import GLOBAL_SEPARATOR, SUB_SEPARATOR, ImageFeatures
from phi4mm_jax.processing.processor import Processor
from phi4mm_jax.processing.prompt import Media

LENGTH = 128


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.from_folder(TINY, Phi4MMConfig.from_folder(TINY))


def some_sizes(rng, count: int, sequences: int, longest: int = LENGTH) -> list[Size]:
    found = []
    for _ in range(count):
        adapter = int(rng.integers(3))
        crops = int(rng.integers(1, 5)) if adapter == 1 else 0
        chunks = int(rng.integers(1, 4)) if adapter == 2 or (adapter == 1 and rng.random() < 0.3) else 0
        tokens = rng.integers(2, longest // sequences + 1, sequences)
        found.append(Size(tuple(map(int, tokens)), crops, chunks, 10 * bool(chunks), adapter))
    return found


def all_plans(planner: Planner, samples: list[PendingSample]):
    """As the stream makes them: a batch as soon as it is complete."""
    rest, ended = iter(samples), False
    while True:
        if (plan := planner.next(ended)) is not None:
            yield plan
        elif ended:
            return
        elif (sample := next(rest, None)) is None:
            ended = True
        else:
            planner.add(sample)


CONFIGS = [
    PackingConfig(4, (LENGTH,), crops=(4, 8, 16), chunks=(8, 12), chunk_tokens=64, window=8),
    PackingConfig(8, (LENGTH,), crops=(16,), chunks=(12,), chunk_tokens=64, window=3),
    PackingConfig(4, (32, 64, LENGTH), pack=False, crops=(8, 16), chunks=(12,), chunk_tokens=64, window=4),
    PackingConfig(4, (48, LENGTH), pack=False, crops=(16,), chunks=(8, 12), chunk_tokens=64, window=64),
]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("hosts", [1, 2])
@pytest.mark.parametrize("sequences", [1, 2])
def test_every_sample_once_and_within_capacities(config, hosts, sequences):
    for seed in range(3):
        sizes = some_sizes(np.random.default_rng(seed), 300, sequences)
        samples = [PendingSample(3 * i, size) for i, size in enumerate(sizes)]
        plans = list(all_plans(Planner(config, hosts, sequences), samples))
        taken = [at for plan in plans for host in plan.bins for bin_ in host for at in bin_]
        assert sorted(taken) == [w.position for w in samples]
        for plan in plans:
            assert plan.sizes.length in config.lengths
            assert plan.sizes.crops * hosts in config.crops
            assert plan.sizes.chunks * hosts in config.chunks
            rows = config.rows * (LENGTH // plan.sizes.length)
            assert [len(host) for host in plan.bins] == [rows // hosts // (1 if config.pack else sequences)] * hosts
            for host in plan.bins:
                of_host = [sizes[at // 3] for bin_ in host for at in bin_]
                assert sum(s.crops for s in of_host) <= plan.sizes.crops
                assert sum(s.chunks for s in of_host) <= plan.sizes.chunks
                for bin_ in host:
                    in_bin = [sizes[at // 3] for at in bin_]
                    assert len({s.adapter for s in in_bin}) <= 1
                    tokens = [sum(s.tokens) if config.pack else max(s.tokens) for s in in_bin]
                    assert sum(tokens) <= plan.sizes.length
                    assert config.pack or len(bin_) <= 1
                    if not config.pack and bin_:  # in the shortest rows that it fits into
                        assert plan.sizes.length == min(n for n in config.lengths if n >= tokens[0])


def test_a_plan_resumes_from_the_samples_that_wait():
    for config, sequences in itertools.product(CONFIGS, (1, 2)):
        samples = [PendingSample(i, s) for i, s in enumerate(some_sizes(np.random.default_rng(7), 200, sequences))]
        plans = list(all_plans(Planner(config, 2, sequences), samples))
        planner, read = Planner(config, 2, sequences), 0
        for number in range(len(plans)):
            again = Planner(config, 2, sequences)
            for waiting in planner.pending:
                again.add(waiting)
            planner = again
            while (plan := planner.next(read == len(samples))) is None:
                planner.add(samples[read])
                read += 1
            assert plan == plans[number]


def test_packed_rows_are_nearly_full():
    rng = np.random.default_rng(0)
    sizes = [Size((int(n),), 0, 0, 0, 2) for n in np.clip(rng.lognormal(5, 0.8, 2000), 10, 2048)]
    samples = [PendingSample(i, size) for i, size in enumerate(sizes)]
    plans = list(all_plans(Planner(PackingConfig(8, (2048,))), samples))
    filled = sum(s.tokens[0] for s in sizes) / (len(plans) * 8 * 2048)
    assert filled > 0.95
    order = [max(at for host in plan.bins for bin_ in host for at in bin_) for plan in plans]
    assert order == sorted(order)  # none waits for long


def test_an_unfilled_batch_waits_for_as_many_samples_as_its_window():
    planner = Planner(PackingConfig(1, (LENGTH,), window=2))
    for i in range(4):  # one is in the row, and two are held back
        assert planner.next() is None
        planner.add(PendingSample(i, Size((LENGTH - 1,), 0, 0, 0, 0)))
    assert planner.next().bins == (((0,),),)


def test_samples_that_fill_a_row_exactly_share_it():
    halves = [PendingSample(i, Size((LENGTH // 2,), 0, 0, 0, 0)) for i in range(8)]
    (plan,) = all_plans(Planner(PackingConfig(4, (LENGTH,))), halves)
    assert plan.bins == (((0, 1), (2, 3), (4, 5), (6, 7)),)


def fake_example(rng, processor: Processor, size: Size, ids) -> list[Example]:
    """Sequences whose features tell which they are: each crop and each frame holds a number of its own."""
    clips = []
    for _ in range(size.chunks):
        frames = np.zeros((8 * int(rng.integers(2, 9)), 80), np.float32)
        frames[:] = next(ids) + np.arange(len(frames))[:, None] / 1000
        clips.append(frames)
    images = []
    if size.crops:
        crops = np.zeros((size.crops, 448, 448, 3), np.float32)
        crops += np.array([next(ids) for _ in range(size.crops)]).reshape(-1, 1, 1, 1)
        layout = rng.integers(0, 256 * size.crops, 12)
        layout[[3, 8]] = SUB_SEPARATOR, GLOBAL_SEPARATOR
        images = [ImageFeatures(crops, np.ones((size.crops, 32, 32), bool), layout)]
    media = [(Media("audio", i), len(c) // 8) for i, c in enumerate(clips)]
    media += [(Media("image", i), len(f.layout)) for i, f in enumerate(images)]
    prefix = sum(n for _, n in media)
    starts = tuple((m, sum(n for _, n in media[:i])) for i, (m, _) in enumerate(media))
    found = []
    for n in size.tokens:
        row = Row(rng.integers(5, 600, prefix + n).astype(np.int32), starts, tuple(images), tuple(clips))
        found.append(Example(row, rng.random(prefix + n) < 0.4))
    return found


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize(("hosts", "sequences"), [(1, 1), (2, 1), (2, 2)])
def test_batches_hold_what_was_planned(processor, pack, hosts, sequences):
    """The hosts' parts are joined, and then read back: tokens, targets, weights, and each medium's features."""
    rng, ids = np.random.default_rng(hosts + sequences), itertools.count(1)
    lengths = (256,) if pack else (128, 256)
    config = PackingConfig(4, lengths, pack=pack, crops=(4, 8), chunks=(8, 16), chunk_tokens=16, window=4)
    examples, samples = {}, []
    for at, size in enumerate(some_sizes(rng, 14, sequences, 128)):
        examples[at] = fake_example(rng, processor, size, ids)
        tokens = tuple(len(e.row.tokens) for e in examples[at])
        samples.append(PendingSample(at, size._replace(tokens=tokens, crops=size.crops, chunks=size.chunks)))
    lost = 5  # cannot be read after all
    kept = {at: e for at, e in examples.items() if at != lost}
    for plan in all_plans(Planner(config, hosts, sequences), samples):
        parts = [build_batch(processor, config, plan, host, kept, sequences) for host in range(hosts)]
        check_joined(processor, config, plan, parts, kept, sequences)


def check_joined(processor, config, plan, parts, kept, sequences) -> None:
    joined = {
        name: np.concatenate([getattr(p.batch, name) for p in parts])
        for name in ("tokens", "lengths", "adapters", "media")
    }
    targets, weights = (np.concatenate([getattr(p, name) for p in parts]) for name in ("targets", "weights"))
    crops, frames, first, last, with_images = (
        np.concatenate([getattr(stack(p.batch), name) for p in parts])
        for stack, name in [
            (lambda b: b.images, "crops"),
            *((lambda b: b.audio, n) for n in ("frames", "first", "last", "with_images")),
        ]
    )
    expected = []
    for bin_ in (bin_ for host in plan.bins for bin_ in host):
        found = [e for at in bin_ for e in kept.get(at, ())]
        expected += [found] if config.pack else [[e] for e in found] or [[]] * sequences
    assert len(expected) == len(joined["tokens"])
    seen = np.zeros(weights.shape, bool)
    for b, row in enumerate(expected):
        start = 0
        for number, example in enumerate(row, 1):
            own = slice(start, start + len(example.row.tokens))
            np.testing.assert_array_equal(joined["tokens"][b, own], example.row.tokens)
            np.testing.assert_array_equal(targets[b, own][:-1], example.row.tokens[1:])
            np.testing.assert_array_equal(weights[b, own], [*example.loss_mask[1:], 0])
            assert joined["adapters"][b] == example.row.adapter
            if config.pack:
                assert set(np.concatenate([p.batch.segments for p in parts])[b, own]) == {number}
            check_media(joined["media"][b, own], example.row, crops, (frames, first, last, with_images))
            seen[b, own], start = True, own.stop
        assert joined["lengths"][b] == start
    assert not weights[~seen].any()
    assert (joined["tokens"][~seen] == processor.config.pad_token_id).all()
    assert (joined["media"][~seen] == NO_MEDIA).all()
    if config.pack:
        assert not np.concatenate([p.batch.segments for p in parts])[~seen].any()
    else:
        assert all(p.batch.segments is None for p in parts)


def check_media(media, row: Row, crops, audio) -> None:
    frames, first, last, with_images = audio
    chunk = frames.shape[1] // 8 - 1
    separators = 256 * len(crops)
    taken = np.zeros(len(media), bool)
    for medium, start in row.media:
        if medium.kind == "image":
            layout = row.images[medium.index].layout
            index = media[start : start + len(layout)]
            for i, feature in zip(index, layout, strict=True):
                if feature < 0:
                    assert i == separators + (feature == GLOBAL_SEPARATOR)
                else:
                    assert i % 256 == feature % 256
                    assert crops[i // 256, 0, 0, 0] == row.images[medium.index].crops[feature // 256, 0, 0, 0]
        else:
            clip = row.clips[medium.index]
            index = media[start : start + len(clip) // 8] - separators - 2
            for token, i in enumerate(index):
                a, at = divmod(int(i), chunk)
                assert frames[a, 8 + 8 * at, 0] == clip[8 * token, 0]
                assert (first[a], last[a]) == (8, 8 + len(clip))
                assert with_images[a] == bool(row.images)
        taken[start : start + len(index)] = True
    assert (media[~taken] == NO_MEDIA).all()


def test_a_pair_shares_its_features(processor):
    """Stacked once, where both rows point."""
    size = Size((20, 30), 2, 1, 5, 1)
    pair = fake_example(np.random.default_rng(0), processor, size, itertools.count(1))
    tokens = tuple(len(e.row.tokens) for e in pair)
    config = PackingConfig(2, (128,), pack=False, crops=(2,), chunks=(1,), chunk_tokens=16)
    planner = Planner(config, 1, 2)
    planner.add(PendingSample(0, size._replace(tokens=tokens)))
    batch = build_batch(processor, config, planner.next(), 0, {0: pair}, 2).batch
    shared = sum(len(f.layout) for f in pair[0].row.images) + sum(len(c) // 8 for c in pair[0].row.clips)
    np.testing.assert_array_equal(batch.media[0, :shared], batch.media[1, :shared])
    assert batch.images.crops[:, 0, 0, 0].tolist() == pair[0].row.images[0].crops[:, 0, 0, 0].tolist()


def test_without_media_there_are_no_stacks(processor):
    config = PackingConfig(2, (64,))
    planner = Planner(config)
    planner.add(PendingSample(0, Size((9,), 0, 0, 0, 0)))
    example = Example(Row(np.arange(9, dtype=np.int32), (), (), ()), np.ones(9, bool))
    batch = build_batch(processor, config, planner.next(ended=True), 0, {0: [example]}).batch
    assert (batch.images, batch.audio) == (None, None)
    assert batch.lengths.tolist() == [9, 0]


def test_long_clips_fill_several_chunks_as_in_inference(processor):
    """The same as inference has them, at another place."""
    clip = np.random.default_rng(0).random((8 * 1100, 80), np.float32)
    count = 1100
    row = Row(np.ones(count + 4, np.int32), ((Media("audio", 0), 2),), (), (clip,))
    alone = processor.batch([row])
    config = PackingConfig(2, (2048,), chunks=(8,))
    planner = Planner(config, hosts=2)
    size = Size((len(row.tokens),), 0, num_chunks(count, 500), 500, 2)
    planner.check(size, Outline(row.tokens, (), (count,), 0))
    planner.add(PendingSample(0, size))
    planner.add(PendingSample(1, size))
    plan = planner.next(ended=True)
    example = Example(row, np.ones(len(row.tokens), bool))
    second = build_batch(processor, config, plan, 1, {0: [example], 1: [example]}).batch
    assert plan.bins == (((0,),), ((1,),))
    for ours, theirs in zip(second.audio, alone.audio, strict=True):
        np.testing.assert_array_equal(ours[:3], theirs[:3])
    np.testing.assert_array_equal(second.media[0, 2 : count + 2], alone.media[0, 2 : count + 2] + 4 * 512)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (
            Size((129,), 0, 0, 0, 0),
            "the sample has 129 tokens .text: 109, image 1: 15, audio 1: 5., but the row length is 128",
        ),
        (
            Size((9,), 5, 0, 0, 1),
            "the sample has 5 crops, which exceeds the per-host limit .* over 2 hosts. of 4; .* lower max_crops",
        ),
        (Size((9,), 0, 4, 9, 2), "the sample has 4 chunks, which exceeds the per-host limit .* of 3; raise chunks"),
        (Size((9,), 0, 1, 65, 2), "a clip has 65 tokens, but chunk_tokens is 64"),
    ],
)
def test_samples_that_no_batch_can_take_are_refused(size, message):
    planner = Planner(PackingConfig(2, (LENGTH,), crops=(2, 8), chunks=(6,), chunk_tokens=64), hosts=2)
    with pytest.raises(BadSample, match=message) as caught:
        planner.check(size, Outline(np.zeros(size.tokens[0]), (15,), (5,), size.crops))
    assert caught.value.cause == "length"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 0}, "rows is 0"),
        ({"lengths": ()}, r"lengths is \(\); expected one"),
        ({"lengths": (64, 128)}, "packed rows all have the same length"),
        ({"lengths": (128, 64), "pack": False}, "ascending"),
        ({"crops": (0, 4)}, "crops is .0, 4.; expected positive"),
        ({"chunks": [4]}, "chunks is .4."),
        ({"window": True}, "window is True"),
    ],
)
def test_settings_are_checked(change, message):
    with pytest.raises(InputError, match=message):
        PackingConfig(**{"rows": 2, "lengths": (64,), **change})


@pytest.mark.parametrize(
    ("config", "sequences", "message"),
    [
        (PackingConfig(3, (64,)), 1, "rows is 3; it must be a multiple of 2 .2 hosts."),
        (
            PackingConfig(2, (64,), pack=False),
            2,
            "rows is 2; it must be a multiple of 4 .2 hosts x 2 rows per preference pair",
        ),
        (PackingConfig(2, (64,), crops=(3,)), 1, "crops is 3"),
    ],
)
def test_hosts_have_equal_parts(config, sequences, message):
    with pytest.raises(InputError, match=message):
        Planner(config, 2, sequences)


CLIPS = Size((400,), 0, 1, 375, 2)  # 30 s and a few words


@pytest.mark.parametrize(
    ("sizes", "options", "rows", "length", "media"),
    [
        ([CLIPS] * 100, {}, 2, 4096, ((), (20,), 384)),  # an eighth of 40,000 tokens, ten clips a row
        ([CLIPS] * 5000, {}, 8, 4096, ((), (80,), 384)),
        ([CLIPS] * 5000, {"divisors": Divisors(16, 2)}, 16, 4096, ((), (160,), 384)),
        ([CLIPS] * 100, {"divisors": Divisors(4)}, 4, 1280, ((), (12,), 384)),
        ([CLIPS] * 100, {"accumulate": 2}, 1, 2560, ((), (6,), 384)),
        ([CLIPS] * 3, {}, 1, 448, ((), (1,), 384)),
        ([CLIPS] * 3, {"context": 420}, 1, 420, ((), (1,), 384)),
        ([CLIPS] * 3 + [Size((9000,), 30, 0, 0, 1)], {}, 1, 10240, ((32,), (3,), 384)),
        ([Size((9,), 0, 0, 0, 0)] * 20, {"others": [Size((200,), 3, 0, 0, 1)]}, 1, 224, ((3,), (), 64)),
        ([Size((100, 60), 2, 0, 0, 1)] * 16, {"kind": "preferences"}, 4, 112, ((4,), (), 64)),
        ([Size((100, 60), 2, 0, 0, 1)], {"kind": "preferences", "divisors": Divisors(3)}, 6, 112, ((3,), (), 64)),
    ],
)
def test_sizes_follow_the_data(sizes, options, rows, length, media):
    """Sizes of 4 to the octave, by hand."""
    options = {"context": 131072, **options}
    found = propose_packing(sizes, **options)
    pack = "kind" not in options
    assert found == PackingConfig(rows, (length,), pack, *media)


def test_what_is_trained_follows_the_data():
    text, picture, clip = Size((9,), 0, 0, 0, 0), Size((9,), 1, 0, 0, 1), CLIPS
    assert propose_trainable([text]) == ("params/decoder",)
    assert propose_trainable([text, clip]) == ("lora_speech",)
    assert propose_trainable([clip, picture]) == ("lora_vision", "lora_speech")


@pytest.mark.parametrize(
    ("adapter", "crops", "chunks", "reached", "unreached"),
    [
        (0, 0, 0, "params/decoder", "lora_vision"),
        (0, 0, 0, "params/decoder/norm", "params/audio_projector/speech"),
        (1, 2, 0, "params/vision/layers", "params/speech"),
        (1, 2, 1, "params/speech", "lora_speech"),
        (2, 0, 1, "lora_speech", "params/image_embedder"),
    ],
)
def test_data_without_the_media_of_what_is_trained_are_refused(adapter, crops, chunks, reached, unreached):
    """An error before the first step, unless something else is trained as well."""
    sizes = [Size((9,), crops, chunks, 5 * chunks, adapter)]
    check_reached(sizes, [reached, f"!{unreached}/bias"])
    check_reached(sizes, [unreached, reached])
    with pytest.raises(InputError, match=f"trainable is {unreached}, which need samples with (images|clips)"):
        check_reached(sizes, [unreached])
