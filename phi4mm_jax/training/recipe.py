"""Recipes: all settings of a run in one YAML file, which arguments may override."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from annotated_types import MinLen
from pydantic import AfterValidator, ConfigDict, TypeAdapter, ValidationError

from phi4mm_jax.data.augment import SpeechAugmentation
from phi4mm_jax.data.packing import PackingConfig
from phi4mm_jax.data.pipeline import DataConfig, Source
from phi4mm_jax.errors import InputError
from phi4mm_jax.model.layers import Remat
from phi4mm_jax.quantization import Weights
from phi4mm_jax.training.dpo import DPOConfig
from phi4mm_jax.training.losses import LossConfig
from phi4mm_jax.training.named_recipes import recipe_path
from phi4mm_jax.training.optimizer import OptimizerConfig
from phi4mm_jax.training.settings import NOTES, setting_names, suggest_setting
from phi4mm_jax.utils.files import write_atomically
from phi4mm_jax.utils.paths import local_path
from phi4mm_jax.utils.strict_yaml import parse_yaml

Count = Annotated[int, AfterValidator(lambda n: _at_least(n, 1))]
Seed = Annotated[int, AfterValidator(lambda n: _at_least(n, 0))]
Metric = Literal["loss", "wer", "cer", "bleu", "exact"]
AUTO = ("auto",)  # as `trainable`: what the data's media need


def _at_least(value: int, min_: int) -> int:
    if value < min_:
        raise ValueError(f"expected a whole number from {min_} on")
    return value


def _without_weights(sources: tuple[Source, ...]) -> tuple[Source, ...]:
    if any(source.weight is not None for source in sources):
        raise ValueError("sources of an evaluation have no weights: each sample counts once")
    return sources


@dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation on other data during the run.

    Attributes:
        sources: manifests, of which each sample counts once.
        every: interval in steps.
        metric: chooses the best checkpoint: the loss or, of generated answers, word or character error rate, BLEU, or
            the fraction of exact matches.
        samples: maximum number of answers to generate, for metrics that need them; evenly over the sources, and within
            each.
        max_new_tokens: of a generated answer.
    """

    sources: Annotated[tuple[Source, ...], AfterValidator(_without_weights)]
    every: Count
    metric: Metric = "loss"
    samples: Count = 200
    max_new_tokens: Count = 256

    @property
    def higher_is_better(self) -> bool:
        """True for a metric of which a higher value is better."""
        return self.metric in ("bleu", "exact")


@dataclass(frozen=True)
class Recipe:
    """Settings of a run.

    Attributes:
        model: the checkpoint to begin with, as `phi4mm_jax.load` takes it.
        output: the run's folder. If it has checkpoints, the run resumes from the last one.
        trainable: patterns of trainable parameters, see `phi4mm_jax.training.param_filter`; or "auto": the adapters of
            the data's media, or the decoder if all are text.
        data: the training data. `data.packing.rows` are those of a micro-batch. Packing may be "auto": sizes that every
            sample fits into, see `phi4mm_jax.data.sizing`. Auto fields are resolved when the run begins.
        accumulate: micro-batches per step.
        fresh_adapters: start from newly initialised adapters if the checkpoint's are all zero.
        dropout: whether to apply LoRA dropout, as the checkpoint's config says.
        dtype: compute dtype; trainable parameters have float32 master weights.
        weights: quantise the frozen linear maps to "int8" or "int4" (QLoRA, arXiv:2305.14314), see
            `phi4mm_jax.quantization`; what is trained stays as `dtype` says.
        remat: what the backward pass recomputes.
        mesh: axes and sizes, such as "fsdp=4,tensor=2", see `phi4mm_jax.mesh`; fsdp takes the remaining devices.
        seed: of dropout. That of the data is `data.seed`.
        save_every: steps between checkpoints.
        keep: number of last checkpoints to keep, besides the best one.
        log_every: steps between lines of metrics.
    """

    model: str
    output: str
    trainable: Annotated[tuple[str, ...], MinLen(1)]
    data: DataConfig
    accumulate: Count = 1
    fresh_adapters: bool = False
    dropout: bool = True
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    weights: Weights | None = None
    remat: Remat = "full"
    mesh: str | None = None
    seed: Seed = 0
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    dpo: DPOConfig = field(default_factory=DPOConfig)
    evaluation: EvaluationConfig | None = None
    save_every: Count = 500
    keep: Count = 2
    log_every: Count = 1

    def __post_init__(self):
        packing = self.data.packing
        several = packing is not None and (len(packing.lengths), *map(len, (packing.crops, packing.chunks))) > (1, 1, 1)
        if self.accumulate > 1 and several:
            raise InputError(
                "accumulate is above 1, and data.packing gives several sizes; micro-batches of one step need one size "
                "of lengths, crops and chunks"
            )
        preferences = self.data.kind == "preferences"
        if preferences and packing is not None and packing.pack:
            raise InputError(
                "data.kind is preferences, and data.packing.pack is true; a row is one answer there: set it to false"
            )
        for name, default in (("loss", LossConfig()), ("dpo", DPOConfig())):
            if (name == "loss") == preferences and getattr(self, name) != default:
                raise InputError(f"{name} has settings, which data.kind={self.data.kind} does not use; leave them out")

    def evaluates_after(self, step: int, steps: int) -> bool:
        """Return whether an evaluation is due after a step of `steps`."""
        return self.evaluation is not None and (step % self.evaluation.every == 0 or step == steps)


_SECTIONS = (DataConfig, Source, PackingConfig, SpeechAugmentation, OptimizerConfig, LossConfig, DPOConfig)
for _strict in (Recipe, EvaluationConfig, *_SECTIONS):
    setattr(_strict, "__pydantic_config__", ConfigDict(extra="forbid", arbitrary_types_allowed=True))  # noqa: B010


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        path: the file, or the name of a recipe of the package, such as "small".
        overrides: settings as "key=value", parts of a key joined by dots, values in YAML: "optimizer.clip=null".

    Raises:
        InputError: the file cannot be read, or a setting is unknown, missing or has a value that cannot be.
    """
    path = recipe_path(path)
    try:
        settings = parse_yaml(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot be read as a recipe ({error})") from error
    if not isinstance(settings, dict):
        raise InputError(f"{path}: is not a recipe; expected settings, such as 'model: FOLDER'")
    origins = {_override(settings, override): f"{override!r:.200}" for override in overrides}
    _encode_auto(settings)
    try:
        recipe = TypeAdapter(Recipe).validate_python(settings)
    except ValidationError as error:
        by_origin = groupby(error.errors(), lambda e: _origin(e, origins) or str(path))
        raise InputError("; ".join(f"{origin}: {'; '.join(map(_describe, es))}" for origin, es in by_origin)) from error
    for place, value in _switched(settings, recipe):
        origin = _origin({"loc": place, "msg": ""}, origins) or str(path)
        raise InputError(f"{origin}: {'.'.join(place)}: expected a number (it is {value})")
    return recipe


def _switched(settings: Any, found: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], bool]]:
    """Yield the settings that are true or false where a number is expected, for which pydantic takes 1 or 0."""
    if isinstance(settings, bool) and not isinstance(found, bool):
        yield place, settings
    elif isinstance(settings, dict) and is_dataclass(found):
        for name, value in settings.items():
            yield from _switched(value, getattr(found, name), (*place, name))
    elif isinstance(settings, list) and isinstance(found, tuple):
        for i, (value, inner) in enumerate(zip(settings, found, strict=True)):
            yield from _switched(value, inner, (*place, str(i)))


def _origin(error: Mapping[str, Any], origins: Mapping[str, str]) -> str | None:
    """Return the overrides that an error is about; None if it is about the file's own settings.

    The last one that gave the setting or its section; of a section's check, all that gave what it names.
    """
    place = _place(error)
    if given := [origin for key, origin in origins.items() if f"{place}.".startswith(f"{key}.")]:
        return given[-1]

    def is_named(key: str) -> bool:  # a section may leave its own name out
        short = re.escape(key.removeprefix(f"{place}."))
        return re.search(rf"(?<![\w.])({re.escape(key)}|{short})\b", error["msg"]) is not None

    named = [origin for key, origin in origins.items() if is_named(key)]
    return ", ".join(named) or None


def _place(error: Mapping[str, Any]) -> str:
    return ".".join(str(part) for part in error["loc"])


def _encode_auto(settings: dict[str, Any]) -> None:
    """Replace the word "auto" by what the fields' types have for it."""
    data = settings.get("data")
    if isinstance(data, dict) and data.get("packing") == "auto":
        data["packing"] = None
    if settings.get("trainable") == "auto":
        settings["trainable"] = AUTO


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write a recipe with all settings, defaults and resolved auto fields included; `load_recipe` reads it."""
    write_atomically(path, yaml.safe_dump(recipe_settings(recipe), sort_keys=False))


def recipe_settings(recipe: Recipe) -> dict[str, Any]:
    """Return all settings of a recipe as plain values."""
    return TypeAdapter(Recipe).dump_python(recipe, mode="json")


# Settings that a resumed run may change. All others decide what the steps before would have been.
_MAY_CHANGE = re.compile(
    r"output|mesh|remat|save_every|keep|log_every|optimizer\..*|evaluation(?!\.metric)(\..*)?"
    r"|data\.(sources|epochs|steps|bad_samples|threads|prefetch)(\..*)?"
)


def resolved_as_before(recipe: Recipe, path: Path) -> Recipe:
    """Return the recipe, with the auto fields as resolved by the run that was saved at `path`.

    Raises:
        InputError: that run cannot be resumed with this recipe.
    """
    before = load_recipe(path)
    if recipe.data.packing is None:
        recipe = replace(recipe, data=replace(recipe.data, packing=before.data.packing))
    recipe = replace(recipe, trainable=before.trainable) if recipe.trainable == AUTO else recipe
    _check_same_run(recipe, before, path)
    return recipe


def _check_same_run(recipe: Recipe, before: Recipe, path: Path) -> None:
    saved, now = (_flat(recipe_settings(r)) for r in (before, recipe))
    for name in sorted(saved.keys() | now.keys()):
        old, new = saved.get(name), now.get(name)
        if name == "evaluation.metric" and old is None:
            continue  # no checkpoint has a score yet; without a metric, those that have could not be compared
        if old != new and not _MAY_CHANGE.fullmatch(name):
            raise InputError(
                f"{path}: the run was begun with {name}={old!r:.80}, and cannot be resumed with {new!r:.80}; set it "
                "back, or give another output"
            )


def check_sources(recipe: Recipe) -> None:
    """Check that the manifests are there, before work that takes long.

    Raises:
        InputError: one cannot be read; it names the setting.
    """
    named = {"data.sources": recipe.data.sources}
    named |= {"evaluation.sources": recipe.evaluation.sources} if recipe.evaluation is not None else {}
    for setting, sources in named.items():
        for source in sources:
            path = local_path(source.path)
            try:
                path.stat() if path.is_dir() else path.open("rb").close()
            except OSError as error:
                raise InputError(
                    f"{path}: cannot be read ({error.strerror}); the recipe has it in {setting}: give your own by "
                    f"{setting}=[{{path: FILE}}]"
                ) from error


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _override(settings: dict[str, Any], override: str) -> str:
    """Change a setting; return its name, or that of the outermost section that was made for it."""
    key, equals, value = override.partition("=")
    if not key or not equals:
        raise InputError(f"{override!r}: expected key=value, such as optimizer.learning_rate=1e-4")
    *parents, last = key.split(".")
    inner: Any = settings
    made = key
    for i, parent in enumerate(parents, 1):
        if inner.get(parent) is None:
            inner[parent] = {}
            made = min(made, ".".join(parents[:i]), key=len)
        inner = inner[parent]
        if not isinstance(inner, dict):
            section = ".".join(parents[:i])
            raise InputError(
                f"{override!r}: {section} is {inner!r:.40}, which has no settings of its own; give {section}={{...}} "
                "with all that it needs"
            )
    try:
        inner[last] = parse_yaml(value)
    except yaml.YAMLError as error:
        raise InputError(f"{override!r}: the value is not YAML ({error})") from error
    return made


def _describe(error: Mapping[str, Any]) -> str:
    place = _place(error)
    if error["type"] == "missing":
        return f"{place}: is missing; give it"
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        suggestion = suggest_setting(place, list(setting_names(Recipe)))
        remedy = f"; did you mean {suggestion}?" if suggestion else ""
        if note := NOTES.get(place.rpartition(".")[2]):
            remedy = f": {note}; take it out"
        return f"{place}: is not a setting of a recipe{remedy}"
    if (list_of := _as_list(place, error)) is not None:
        return f"{place}: is {error['input']!r:.60}, and a list is expected; write {list_of}"
    message = error["msg"].removeprefix("Value error, ")
    is_section = isinstance(error["input"], Mapping)  # whose own check names the setting, and the value
    if is_section:
        return f"{place}: {message}" if place else message
    return f"{place}: {message} (it is {error['input']!r:.60})"


def _as_list(place: str, error: Mapping[str, Any]) -> str | None:
    """Return a list for a single text."""
    value, name = error["input"], place.rstrip("0123456789").rstrip(".")
    if not isinstance(value, str) or error["type"] != ("tuple_type" if name == place else "dataclass_type"):
        return None
    return f"{name}=[{{path: {value}}}]" if name.endswith("sources") else f"{name}=[{value}]"
