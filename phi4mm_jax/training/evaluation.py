"""Evaluation during a run: the loss on other data, and the errors of generated answers."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from phi4mm_jax.api import Model
from phi4mm_jax.errors import InputError
from phi4mm_jax.generation import Engine, EngineConfig, Programs, Request
from phi4mm_jax.model import Phi4MM
from phi4mm_jax.processing.chat import with_paths
from phi4mm_jax.sharding import jit_beside
from phi4mm_jax.training.data import DataConfig, TrainingData
from phi4mm_jax.training.manifests import open_manifest
from phi4mm_jax.training.patterns import join
from phi4mm_jax.training.recipe import EvaluationConfig
from phi4mm_jax.training.step import Objective, Variables


def wer(references: Sequence[str], answers: Sequence[str]) -> float:
    """Word errors by the words of the references, of all answers together."""
    import jiwer

    return jiwer.wer(list(references), list(answers))


def cer(references: Sequence[str], answers: Sequence[str]) -> float:
    """Likewise of characters."""
    import jiwer

    return jiwer.cer(list(references), list(answers))


def bleu(references: Sequence[str], answers: Sequence[str]) -> float:
    """Of the corpus, by sacreBLEU's own tokenisation; 0 to 100."""
    import sacrebleu

    return sacrebleu.corpus_bleu(list(answers), [list(references)]).score


def exact(references: Sequence[str], answers: Sequence[str]) -> float:
    """The share of answers that are the reference, white space around them aside."""
    return float(np.mean([a.strip() == r.strip() for r, a in zip(references, answers, strict=True)]))


METRICS: Mapping[str, Callable[[Sequence[str], Sequence[str]], float]] = {  # (references, answers) -> score
    "wer": wer, "cer": cer, "bleu": bleu, "exact": exact,
}  # fmt: skip


class Evaluation:
    """To be called with the parameters of a step."""

    def __init__(self, config: EvaluationConfig, data: DataConfig, model: Model, module: Phi4MM):
        self._config, self._model = config, model
        self._data = dataclasses.replace(
            data, sources=config.sources, epochs=1, steps=None, shuffle=False, augment_image=None, augment_clip=None
        )
        self._programs = Programs(Phi4MM(module.config, module.dtype), model.variables)
        self._compiled: Any = None
        self._requests, self._references = ([], []) if config.metric == "loss" else self._asked()

    def _asked(self) -> tuple[list[Request], list[str]]:
        """The last turn of each conversation is the answer that is asked for."""
        requests, references = [], []
        for source in self._config.sources:
            manifest = open_manifest(Path(source.path))
            for number in range(min(len(manifest), self._config.samples - len(requests))):
                messages = manifest.read(number)["messages"]
                messages = json.loads(messages) if isinstance(messages, str) else messages
                answer = messages[-1].get("content") if messages else None
                if not isinstance(answer, str) or messages[-1].get("role") != "assistant":
                    raise InputError(
                        f"{manifest.where(number)}: does not end with an answer in plain text, as the metric "
                        f"{self._config.metric} needs; repair it, or leave it out of evaluation.sources"
                    )
                prompt = with_paths(messages[:-1], manifest.folder)
                requests.append(Request(prompt, max_new_tokens=self._config.max_new_tokens))
                references.append(answer)
        return requests, references

    def __call__(
        self, trainable: Variables, frozen: Variables, objective: Objective, place: Callable[[list], Any]
    ) -> dict[str, float]:
        """evaluation_loss, and the recipe's metric."""
        if self._compiled is None:
            self._compiled = jit_beside(trainable, lambda t, f, b: objective(t, f, b, None)[1])
        loss = weight = 0.0
        data = TrainingData(self._data, self._model.processor, jax.process_index(), jax.process_count())
        for batch in data:
            found = self._compiled(trainable, frozen, jax.tree.map(lambda x: x[0], place([batch])))
            loss, weight = loss + float(found.loss), weight + float(found.weight)
        data.close()
        values = {"evaluation_loss": loss / max(weight, 1.0)}
        if self._requests:
            score = METRICS[self._config.metric](self._references, self._answers(trainable, frozen))
            values[f"evaluation_{self._config.metric}"] = score
        return values

    def _answers(self, trainable: Variables, frozen: Variables) -> list[str]:
        dtype = self._programs.model.dtype
        variables = join(jax.tree.map(lambda x: jnp.asarray(x, dtype), trainable), frozen)
        engine = Engine(self._programs, variables, self._model.processor, EngineConfig())
        answers = dict(engine.run(self._requests))
        return [answers[i].text for i in range(len(self._requests))]
