"""Stream of training batches: read, shuffled, mixed, packed, and resumed exactly where it was.

    manifests --shuffle, mix--> positions --measure (threads)--> sizes --plan--> batches of positions --load--> arrays

Everything up to the plan is the same on every host, and cheap: texts are tokenised, of media only headers are read;
but videos are decoded. A host then loads the samples of its own rows. The order of all samples is known by their
positions in the stream, so the state of a run is a few numbers: the next position, and which ones wait for a batch.
"""

import contextlib
import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import grain
import numpy as np

from phi4mm_jax.adapters import NONE, adapter_choices, index_of
from phi4mm_jax.batch import TrainingBatch
from phi4mm_jax.data.augment import (
    CLIP_AUGMENTATIONS,
    IMAGE_AUGMENTATIONS,
    Augment,
    AugmentClip,
    AugmentImage,
    SpeechAugmentation,
)
from phi4mm_jax.data.examples import BadSample, Example, Kind, Sample, Size, load_examples, measure, parse_sample
from phi4mm_jax.data.manifests import open_manifests
from phi4mm_jax.data.packing import PackingConfig, PendingSample, Plan, Planner, build_batch
from phi4mm_jax.data.plans import BadSampleLimit, Plans, Tally, sample_order
from phi4mm_jax.errors import InputError
from phi4mm_jax.processing.images import check_max_crops
from phi4mm_jax.processing.processor import Processor
from phi4mm_jax.utils.checks import check_whole
from phi4mm_jax.utils.paths import local_path

Measure = Callable[[int, Any], PendingSample | BadSample]  # of a position in the stream, and the item there
_MAY_DIFFER = {"bytes", "hosts"}  # between a state and the stream that resumes there
_MIN_SAMPLES = 100  # before a rate of bad samples means anything


@dataclass(frozen=True)
class Source:
    """Manifest and its share of the stream.

    Attributes:
        path: a file of JSON lines, a Parquet file, or the folder of a Hugging Face dataset.
        weight: relative; the fraction of samples from this source is its fraction of all weights. None for all sources:
            every sample comes once per epoch.
    """

    path: str
    weight: float | None = None


@dataclass(frozen=True)
class DataConfig:
    """Data of a run, their order, and the shapes of their batches.

    Attributes:
        sources: the manifests.
        kind: conversations with answers, or preferences.
        packing: the shapes of batches; None in a recipe is auto: a run sizes them by its data.
        epochs: passes over the data, or as many samples.
        steps: number of batches, whatever the epochs. Give either this or epochs.
        seed: of shuffling and augmentation.
        shuffle: each epoch has another order; otherwise that of the files.
        max_crops: per image, besides its global view.
        adapter: "none" or an adapter's name, for all samples; by default each has that of its media.
        augment_image, augment_clip: "jitter" and "noise", or your own functions, see `Augment`.
        augment_speech: speed, pitch and masks of clips, each drawn by the seed and the sample's position in the stream.
        bad_samples: fraction of samples that may be unusable. They are skipped and counted; a larger fraction, of at
            least 100 samples or of an epoch, ends the run. With 0 the first one does.
        threads: that read and process samples.
        prefetch: batches to load ahead.

    Raises:
        InputError: a value out of range.
    """

    sources: tuple[Source, ...]
    packing: PackingConfig | None
    kind: Kind = "answers"
    epochs: int | None = None
    steps: int | None = None
    seed: int = 0
    shuffle: bool = True
    max_crops: int | None = None
    adapter: str | None = None
    augment_image: Literal["jitter"] | AugmentImage | None = None
    augment_clip: Literal["noise"] | AugmentClip | None = None
    augment_speech: SpeechAugmentation | None = None
    bad_samples: float = 0.0
    threads: int = 8
    prefetch: int = 2

    def __post_init__(self):
        weights = [s.weight for s in self.sources]
        if not self.sources:
            raise InputError("sources is empty; give at least one manifest")
        if any(w is None for w in weights) and any(w is not None for w in weights):
            raise InputError("some sources have a weight and others none; give one to all, or to none")
        for source in self.sources:
            if source.weight is not None and not 0 < source.weight < math.inf:
                raise InputError(f"{source.path}: its weight is {source.weight!r:.40}; expected a positive number")
        if (self.epochs is None) == (self.steps is None):
            raise InputError(
                f"epochs is {self.epochs} and steps is {self.steps}; give one of them, and null for the other"
            )
        for name, min_ in (("epochs", 1), ("steps", 1), ("seed", 0), ("threads", 1), ("prefetch", 1)):
            value = getattr(self, name)
            if value is not None:
                check_whole(name, value, min_)
        if self.max_crops is not None:
            check_max_crops("max_crops", self.max_crops)
        if not 0 <= self.bad_samples < 1:
            raise InputError(f"bad_samples is {self.bad_samples!r:.40}; expected a fraction from 0 to below 1")
        if self.kind not in ("answers", "preferences"):
            raise InputError(f"kind is {self.kind!r:.40}; expected answers or preferences")
        if self.adapter is not None and self.adapter not in adapter_choices():
            raise InputError(f"adapter is {self.adapter!r:.60}; expected one of {', '.join(adapter_choices())}")
        _augment(self)

    @property
    def sizes(self) -> PackingConfig:
        """The packing.

        Raises:
            InputError: it is None (auto).
        """
        if self.packing is None:
            raise InputError("packing is None, which only a recipe may leave to its data; give a PackingConfig")
        return self.packing


def without_augmentation(config: DataConfig) -> DataConfig:
    """Return the settings without augmentation."""
    return replace(config, augment_image=None, augment_clip=None, augment_speech=None)


def _augment(config: DataConfig) -> Augment:
    def chosen(name: str, value: Any, known: Mapping[str, Any]) -> Any:
        if value is None or callable(value):
            return value
        if value not in known:
            raise InputError(f"{name} is {value!r:.40}; expected {' or '.join(known)}, or a function")
        return known[value]

    return Augment(
        chosen("augment_image", config.augment_image, IMAGE_AUGMENTATIONS),
        chosen("augment_clip", config.augment_clip, CLIP_AUGMENTATIONS),
        config.augment_speech,
    )


def _name(augmentation: Any) -> str | None:
    if augmentation is None or isinstance(augmentation, str):
        return augmentation
    function = getattr(augmentation, "func", augmentation)  # of a partial
    return getattr(function, "__qualname__", type(function).__qualname__)


class TrainingData:
    """Iterator of this host's parts of the batches.

    Hosts with the same data have equally many batches, of the same shapes, and different samples of each batch. Their
    parts, concatenated along the first axis of every array, are the batch.

    Raises:
        InputError: on construction: a manifest cannot be read, or the batch cannot be divided among the hosts. On
            iteration: a sample is unusable (`BadSample`, naming file and line), or more of them than are allowed.
    """

    def __init__(self, config: DataConfig, processor: Processor, host: int = 0, hosts: int = 1):
        if not 0 <= host < hosts:
            raise InputError(f"host {host} of {hosts}; expected 0 to {hosts - 1}")
        self._packing = config.sizes
        if self._packing.lengths[-1] > processor.context:
            raise InputError(
                f"data.packing.lengths is {self._packing.lengths}, beyond the model's context of {processor.context}; "
                "lower it, or give data.packing=auto"
            )
        if config.adapter not in (None, NONE, *processor.config.loras):
            raise InputError(
                f"data.adapter is {config.adapter!r}, which the model lacks (it has "
                f"{', '.join(processor.config.loras) or 'none'}); give a model with it"
            )
        self._config, self._processor, self._host, self._hosts = config, processor, host, hosts
        self._augment = _augment(config)
        self._fitting = self._planner()  # raises at once if something cannot be divided
        self._manifests = open_manifests([local_path(source.path) for source in config.sources])
        self._order = sample_order(
            [len(m) for m in self._manifests], [s.weight for s in config.sources if s.weight is not None],
            epochs=config.epochs, shuffle=config.shuffle, seed=config.seed,
        )  # fmt: skip
        self._at: Any = self._order.__getitem__  # position -> source, number
        self._at(0)  # grain creates its counters on the first item, which threads must not do concurrently
        self._limit = BadSampleLimit(config.bad_samples, min(_MIN_SAMPLES, sum(map(len, self._manifests))))
        self._pool = ThreadPoolExecutor(config.threads, "phi4mm-samples")
        self._batches: Any = self._stream(self._load)
        self._steps = 0
        self._tally, self._unreadable = Tally(), Tally()

    def __iter__(self) -> Iterator[TrainingBatch]:
        return self

    def __next__(self) -> TrainingBatch:
        if self._config.steps is not None and self._steps >= self._config.steps:
            raise StopIteration
        batch, self._tally, unreadable = next(self._batches)
        self._unreadable = self._unreadable.plus(unreadable)
        self._steps += 1
        self._limit.check(self._tally.plus(self._unreadable))
        return batch

    def count_batches(self, progress: Callable[[int, int], None] | None = None) -> int:
        """Return the number of batches.

        With `epochs` this reads all texts and the headers of all media, and decodes all videos, once each.
        Only clips with speed augmentation are measured in every epoch, since their lengths differ.

        Args:
            progress: called with the number of samples seen, and of all.
        """
        if self._config.steps is not None:
            return self._config.steps
        return self._count(iter(Plans(self._measured(self._measure_once()), self._planner, self._limit)), progress)

    def count_remaining(self, progress: Callable[[int, int], None] | None = None) -> int:
        """Return the number of batches after the last one taken, counted like `count_batches`."""
        if self._config.steps is not None:
            return max(self._config.steps - self._steps, 0)
        stream = self._stream(lambda planned: planned, self._measure_once())
        try:
            stream.set_state(self._batches.get_state())
            return self._count(stream, progress)
        finally:
            stream.close()

    def _count(self, plans: Iterator[tuple[Plan, Tally]], progress: Callable[[int, int], None] | None) -> int:
        count = 0
        for _, tally in plans:
            count += 1
            if progress is not None:
                progress(tally.seen, len(self._order))
        return count

    def measured_sizes(self) -> list[Size]:
        """Return the sizes of the stream's samples, without bad ones that may be skipped."""
        sizes, tally = [], Tally()
        for measured in self._measured():
            tally = tally._replace(seen=tally.seen + 1)
            if isinstance(measured, BadSample):
                tally = self._limit.skip(tally, measured)
            else:
                sizes.append(measured.size)
            self._limit.check(tally)
        return sizes

    def _stream(self, load: Callable[[tuple[Plan, Tally]], Any], measure: Measure | None = None) -> Any:
        """Return an iterator of `load` over the plans, with prefetching."""
        plans = Plans(self._measured(measure), self._planner, self._limit).map(load)
        return iter(grain.experimental.ThreadPrefetchIterDataset(plans, prefetch_buffer_size=self._config.prefetch))

    @property
    def skipped(self) -> dict[str, int]:
        """Number of samples skipped so far, by cause: of all hosts, but undecodable media only of this host."""
        return dict(self._tally.plus(self._unreadable).skipped)

    def get_state(self) -> dict[str, Any]:
        """Return the state of the stream after the last batch taken.

        Plain values for JSON; the same on every host, except the counts of `skipped`.
        """
        return {
            "data": self._signature, "steps": self._steps, "stream": self._batches.get_state(),
            "tally": self._tally._asdict(), "unreadable": self._unreadable._asdict(),
        }  # fmt: skip

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Resume from a state of `get_state`.

        Raises:
            InputError: the state is of other data. Files of another size with as many samples count as repaired. With
                another number of hosts, batches are the same as long as they have no media.
        """
        ours = self._signature
        absent = {name: ours[name] for name in ("augment_image", "augment_clip")} | {"adapter": None}  # in older states
        theirs = absent | state["data"]
        if different := [name for name in ours if name not in _MAY_DIFFER and theirs.get(name) != ours[name]]:
            name = different[0]
            raise InputError(
                f"the state is of other data: {name} was {theirs.get(name)!r:.200} and is {ours[name]!r:.200}; "
                "resume with the same data, or start over"
            )
        self._batches.set_state(state["stream"])
        self._steps = state["steps"]
        self._tally, self._unreadable = Tally(**state["tally"]), Tally(**state["unreadable"])

    def close(self) -> None:
        """End the threads, and close the manifests."""
        self._batches.close()
        self._pool.shutdown(cancel_futures=True)
        for manifest in self._manifests:
            manifest.close()

    @functools.cached_property
    def _signature(self) -> dict[str, Any]:
        """Settings on which the order and the shapes depend."""
        config = self._config
        speech = config.augment_speech
        signature = {
            "samples": [len(m) for m in self._manifests], "bytes": [m.size for m in self._manifests],
            "weights": [s.weight for s in config.sources], "packing": asdict(self._packing), "kind": config.kind,
            "seed": config.seed, "shuffle": config.shuffle, "max_crops": config.max_crops, "hosts": self._hosts,
            "adapter": config.adapter,
            "augment_image": _name(config.augment_image), "augment_clip": _name(config.augment_clip),
            "augment_speech": None if speech is None else asdict(speech),
        }  # fmt: skip
        return json.loads(json.dumps(signature))  # lists for tuples, as a state has them that was stored

    def _measured(self, measure: Measure | None = None) -> grain.IterDataset:
        threads = self._config.threads
        reading = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=8 * threads)
        return self._order.map_with_index(measure or self._measure).to_iter_dataset(reading)

    def _planner(self) -> Planner:
        return Planner(self._packing, self._hosts, self._sequences_per_sample)

    @property
    def _sequences_per_sample(self) -> int:
        return 2 if self._config.kind == "preferences" else 1

    @contextlib.contextmanager
    def _sample(self, position: int) -> Iterator[Sample]:
        """Yield a sample; errors about it, here or in the body of `with`, name its place."""
        source, number = self._at(position)
        manifest = self._manifests[source]
        try:
            yield parse_sample(
                manifest.read(number), manifest.folder, self._processor.tokenizer, self._config.kind,
                self._processor.config.vision.crop_size,
            )  # fmt: skip
        except BadSample as error:
            raise BadSample(error.cause, f"{manifest.where(number)}: {error}") from error

    def _rng(self, position: int) -> np.random.Generator:
        return np.random.default_rng((self._config.seed, position))

    def _measure(self, position: int, _: Any) -> PendingSample | BadSample:
        try:
            with self._sample(position) as sample:
                speech, max_crops = self._config.augment_speech, self._config.max_crops
                # Whether it fits must not depend on the augmentation.
                size, outline = measure(sample, self._processor, max_crops, speech)
                self._fitting.check(size, outline)
                if speech is not None and speech.speed is not None and size.chunks:
                    size, _ = measure(sample, self._processor, max_crops, speech, self._rng(position))
                if self._config.adapter is not None:
                    size = size._replace(adapter=index_of(self._config.adapter))
                return PendingSample(position, size)
        except BadSample as error:
            return error

    def _measure_once(self) -> Measure:
        """Return a `_measure` that caches each sample's size, unless augmentation changes it."""
        found: list[list[Size | BadSample | None]] = [[None] * len(manifest) for manifest in self._manifests]
        same: dict[Size, Size] = {}  # in memory once
        speech = self._config.augment_speech

        def measure(position: int, item: Any) -> PendingSample | BadSample:
            source, number = self._at(position)
            known = found[source][number]
            if known is None:
                measured = self._measure(position, item)
                known = measured.size if isinstance(measured, PendingSample) else measured
                if isinstance(known, BadSample) or not (known.chunks and speech and speech.speed):
                    found[source][number] = known if isinstance(known, BadSample) else same.setdefault(known, known)
            return known if isinstance(known, BadSample) else PendingSample(position, known)

        return measure

    def _examples(self, position: int) -> tuple[Example, ...] | BadSample:
        max_crops = self._config.max_crops
        try:
            with self._sample(position) as sample:
                return load_examples(sample, self._processor, max_crops, self._augment, self._rng(position))
        except BadSample as error:
            return error

    def _load(self, planned: tuple[Plan, Tally]) -> tuple[TrainingBatch, Tally, Tally]:
        """Return this host's part of a batch, the tally until then, and the tally of samples unreadable here."""
        plan, tally = planned
        positions = [at for bin_ in plan.bins[self._host] for at in bin_]
        found = dict(zip(positions, self._pool.map(self._examples, positions), strict=True))
        unreadable = Tally()
        for error in found.values():
            if isinstance(error, BadSample):
                unreadable = self._limit.skip(unreadable, error)
        examples = {at: e for at, e in found.items() if not isinstance(e, BadSample)}
        batch = build_batch(
            self._processor, self._packing, plan, self._host, examples, self._sequences_per_sample, self._config.adapter
        )
        return batch, tally, unreadable


def measure_samples(config: DataConfig, processor: Processor) -> list[Size]:
    """Return the sizes of all samples, each once, whatever its source's weight, with clips at their slowest.

    Bad samples that may be skipped are excluded.

    Raises:
        InputError: as `TrainingData`, except for samples that exceed a batch.
    """
    media = (1 << 40,)
    packing = PackingConfig(2, (processor.context,), False, media, media, processor.config.speech.chunk_tokens)
    sources = tuple(Source(source.path) for source in config.sources)
    speech = config.augment_speech
    if speech is not None and speech.speed is not None:
        speech = replace(speech, speed=(speech.speed[0],) * 2)
    once = replace(config, packing=packing, sources=sources, epochs=1, steps=None, augment_speech=speech)
    with contextlib.closing(TrainingData(once, processor)) as data:
        return data.measured_sizes()
