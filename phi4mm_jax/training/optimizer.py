"""AdamW with a schedule and clipping, by optax."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from phi4mm_jax.errors import InputError
from phi4mm_jax.quantization import ParamPath
from phi4mm_jax.training.param_filter import matching
from phi4mm_jax.utils.checks import is_whole

Schedule = Literal["linear", "cosine", "constant"]


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (arXiv:1711.05101); the defaults are those of the published fine-tuning samples,
    but for the warm-up, which is 50 steps there.

    Attributes:
        learning_rate: peak.
        warmup_steps: of linear warm-up from 0: a whole number, or a fraction below 1 of the run's steps.
        schedule: decay from the peak to `final_share` of it at the last step.
        decay: patterns of the parameters that weight decay applies to; by default, as in transformers' Trainer, all but
            biases and the scales of norms.
        clip: maximum global gradient norm; None does not clip.

    Raises:
        InputError: a value out of range.
    """

    learning_rate: float = 4e-5
    warmup_steps: int | float = 0.1
    schedule: Schedule = "linear"
    final_share: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-7
    weight_decay: float = 0.01
    decay: Sequence[str] | None = None
    clip: float | None = 1.0

    def __post_init__(self):
        def check(name: str, valid: bool, expected: str) -> None:
            value = getattr(self, name)
            if not valid or (isinstance(value, float) and not math.isfinite(value)):
                raise InputError(f"optimizer.{name} is {value!r}; expected {expected}")

        check("learning_rate", self.learning_rate > 0, "a positive number")
        is_share = isinstance(self.warmup_steps, float) and 0 <= self.warmup_steps < 1
        is_count = is_whole(self.warmup_steps, 0)
        check(
            "warmup_steps", is_share or is_count, "0, a positive whole number, or a fraction below 1 of the run's steps"
        )
        check("schedule", self.schedule in get_args(Schedule), f"one of {get_args(Schedule)}")
        check("final_share", 0 <= self.final_share <= 1, "a number from 0 to 1")
        check("beta1", 0 <= self.beta1 < 1, "a number from 0 to below 1")
        check("beta2", 0 <= self.beta2 < 1, "a number from 0 to below 1")
        check("eps", self.eps > 0, "a positive number")
        check("weight_decay", self.weight_decay >= 0, "0 (off) or a positive number")
        check("clip", self.clip is None or self.clip > 0, "a positive number, or null (off)")


def make_lr_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Return the learning-rate schedule of a run of `steps`.

    Raises:
        InputError: the warm-up is not over before the last step.
    """
    warmup_steps = config.warmup_steps
    if isinstance(warmup_steps, float):
        warmup_steps = min(math.ceil(warmup_steps * steps), steps - 1)  # rounded as by transformers
    if warmup_steps >= steps:
        raise InputError(
            f"optimizer.warmup_steps is {warmup_steps}, and the run has {steps} steps; warm up over fewer, or over a "
            "fraction of them, such as 0.1"
        )
    peak, rest = config.learning_rate, steps - warmup_steps
    after = {
        "linear": optax.linear_schedule(peak, config.final_share * peak, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest, config.final_share),
        "constant": optax.constant_schedule(peak),
    }[config.schedule]
    warmup = optax.linear_schedule(0.0, peak, warmup_steps)
    return optax.join_schedules([warmup, after], [warmup_steps]) if warmup_steps else after


def decayed_paths(config: OptimizerConfig, trainable: Collection[ParamPath]) -> set[ParamPath]:
    """Return the paths of the parameters that weight decay applies to.

    Raises:
        InputError: a pattern of `decay` matches no trainable parameter.
    """
    if config.decay is None:
        return {path for path in trainable if not path[-1].endswith(("bias", "scale"))}
    return matching(trainable, config.decay, "optimizer.decay") if config.weight_decay else set()


def make_optimizer(config: OptimizerConfig, steps: int, trainable: dict[str, Any]) -> optax.GradientTransformation:
    """Return the optimizer of these parameters, for a run of `steps`.

    Raises:
        InputError: the warm-up is as long as the run, or a pattern of `decay` matches no trainable parameter.
    """
    flat = flatten_dict(trainable)
    decayed = decayed_paths(config, flat.keys())
    mask = unflatten_dict({path: path in decayed for path in flat})
    adamw = optax.adamw(
        make_lr_schedule(config, steps),
        config.beta1,
        config.beta2,
        config.eps,
        weight_decay=config.weight_decay,
        mask=mask,
    )
    # Without clipping the state has the same structure, so that a resumed run may change it.
    clip = optax.identity() if config.clip is None else optax.clip_by_global_norm(config.clip)
    return optax.chain(clip, adamw)
