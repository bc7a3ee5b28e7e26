"""Evaluation during a run: the loss on other data, and the errors of generated answers.

Of several hosts each answers its share, by an engine on its own devices.
"""

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from phi4mm_jax.data.pipeline import DataConfig, TrainingData, without_augmentation
from phi4mm_jax.engine import Engine, EngineConfig, Programs
from phi4mm_jax.evaluation.answers import ask
from phi4mm_jax.evaluation.items import Item, read_items
from phi4mm_jax.evaluation.metrics import corpus_score, make_metric
from phi4mm_jax.mesh import jit_on_mesh
from phi4mm_jax.model import Phi4MM
from phi4mm_jax.processing.processor import Processor
from phi4mm_jax.training.dpo import without_reference
from phi4mm_jax.training.hosts import collect, deal_out
from phi4mm_jax.training.param_filter import join
from phi4mm_jax.training.recipe import EvaluationConfig
from phi4mm_jax.training.sharding import on_own_devices, shard_batches
from phi4mm_jax.training.step import Objective, Variables
from phi4mm_jax.utils.paths import local_path

_CACHE_TOKENS = 32768  # the same on all hosts, and little beside the optimizer


class Evaluation:
    """Evaluates states on held-out data.

    Args:
        data: of training; evaluation data are read likewise, without augmentation.
        module: that computes the loss.
        variables: shapes and dtypes of the model's, with the shardings of the later states.

    Raises:
        InputError: the data cannot be used.
    """

    def __init__(
        self, config: EvaluationConfig, data: DataConfig, processor: Processor, module: Phi4MM, variables: Variables
    ):
        self._config, self._processor = config, processor
        self._data = dataclasses.replace(
            without_augmentation(data), sources=config.sources, epochs=1, steps=None, shuffle=False
        )
        with closing(self.batches()) as stream:
            stream.count_batches()  # reads all samples now, not when the first evaluation is due
        self._programs = Programs(Phi4MM(module.config, module.dtype), on_own_devices(variables))
        self._compiled: Any = None
        self._metric = None if config.metric == "loss" else make_metric(config.metric)
        self._items: list[Item] = []
        share, more = divmod(config.samples, len(config.sources))
        for place, source in enumerate(config.sources if self._metric is not None else ()):
            self._items += read_items(local_path(source.path), share + (place < more))

    def __call__(
        self,
        trainable: Variables,
        frozen: Variables,
        objective: Objective,
        mesh: Mesh | None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> dict[str, float] | None:
        """Return evaluation_loss, and the recipe's metric; None as soon as `stopped` says so."""
        if self._compiled is None:
            self._compiled = jit_on_mesh(trainable, lambda t, f, b: objective(t, f, b, None)[1])
        loss = weight = 0.0
        with closing(self.batches()) as stream:
            for batch in stream:
                on_devices = jax.tree.map(lambda x: x[0], shard_batches([batch], mesh))
                found = self._compiled(trainable, frozen, on_devices)
                loss, weight = loss + float(found.loss), weight + float(found.weight)
                if stopped():
                    return None
        values = {"evaluation_loss": loss / max(weight, 1.0)}
        if self._metric is not None:
            answers = self._answers(trainable, frozen, stopped)
            if answers is None:
                return None
            score = corpus_score(self._metric, [item.references for item in self._items], answers)
            values[f"evaluation_{self._config.metric}"] = score
        return values

    def score(self, values: Mapping[str, float] | None) -> float | None:
        """Return the value that decides which state is the best one; None of an evaluation that was stopped."""
        return None if values is None else values[f"evaluation_{self._config.metric}"]

    def batches(self) -> TrainingData:
        """Return the batches of an evaluation, to be closed."""
        return TrainingData(self._data, self._processor, jax.process_index(), jax.process_count())

    def _answers(self, trainable: Variables, frozen: Variables, stopped: Callable[[], bool]) -> list[str | None] | None:
        dtype = self._programs.model.dtype
        variables = join(jax.tree.map(lambda x: jnp.asarray(x, dtype), trainable), without_reference(frozen))
        config = EngineConfig(cache_tokens=_CACHE_TOKENS)
        engine = Engine(self._programs, on_own_devices(variables), self._processor, config)
        share, length = deal_out(self._items), self._config.max_new_tokens
        answers = ask(engine, share, length, self._data.adapter, stopped, max_crops=self._data.max_crops)
        return None if answers is None else collect([answer.text for answer in answers])
