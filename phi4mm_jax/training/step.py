"""Training step: gradients of the trainable parameters only, accumulated over micro-batches, and one update."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from phi4mm_jax.batch import TrainingBatch
from phi4mm_jax.kernels.tpu import chip_name
from phi4mm_jax.mesh import context_size, split_batch
from phi4mm_jax.model import Phi4MM
from phi4mm_jax.quantization import weight_in
from phi4mm_jax.training.losses import LossConfig, TokenLosses, token_losses
from phi4mm_jax.training.param_filter import join

Variables = dict[str, Any]
_CHIP_OPTIONS: Mapping[str, dict[str, str | bool]] = {
    "TPU v6 lite": {
        "xla_enable_async_all_gather": "true",
        "xla_tpu_enable_async_collective_fusion": "true",
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
        "xla_tpu_scoped_vmem_limit_kib": "65536",
    }
}


class TrainState(NamedTuple):
    """Training state, which a step updates.

    Trainable parameters are fp32 master weights, cast to the compute dtype on use, so that small updates are not lost.
    """

    step: Int[Array, ""]  # updates made
    trainable: Variables
    optimizer: Any


class LossStats(NamedTuple):
    """Sums over the positions of a batch that have a weight. The objective is loss / weight."""

    loss: Float[Array, ""]
    weight: Float[Array, ""]
    log_probability: Float[Array, ""]
    correct: Float[Array, ""]


class Metrics(NamedTuple):
    """Metrics of one step."""

    loss: Float[Array, ""]  # the objective, per target token
    cross_entropy: Float[Array, ""]  # without smoothing and z-loss
    accuracy: Float[Array, ""]  # top-1 token accuracy
    targets: Float[Array, ""]  # weight of all targets
    gradient_norm: Float[Array, ""]  # before clipping


Objective = Callable[[Variables, Variables, Any, Array | None], tuple[Float[Array, ""], LossStats]]


def supervised(model: Phi4MM, config: LossConfig = LossConfig()) -> Objective:  # noqa: B008 (frozen)
    """Return the SFT objective: the summed token cross-entropy."""

    def objective(trainable: Variables, frozen: Variables, batch: TrainingBatch, key: Array | None):
        losses = losses_of(model, trainable, frozen, batch, config, key)
        weights = jnp.asarray(batch.weights, jnp.float32)
        total, log_probability, correct = (jnp.sum(x * weights) for x in losses)
        return total, LossStats(total, weights.sum(), log_probability, correct)

    return objective


def losses_of(
    model: Phi4MM, trainable: Variables, frozen: Variables, batch: TrainingBatch, config: LossConfig, key: Array | None
) -> TokenLosses:
    """Return the losses of a batch's positions; with a key, LoRA dropout is applied."""
    # Cast before the all-gather, which halves the communication.
    variables = join(jax.tree.map(lambda x: x.astype(model.dtype), trainable), frozen)
    rngs = None if key is None else {"dropout": key}
    apply: Callable[..., Any] = model.apply
    with split_batch():
        hidden, parts = apply(variables, batch.batch, method="hidden", rngs=rngs), context_size()
    # Use the fp32 embedding for the LM head: its gradient accumulates over all positions.
    embedding = weight_in(join(trainable, frozen)["params"]["decoder"], "embedding")

    def split_context(x):  # to the loss, each device's part of a row is a row
        return x.reshape(x.shape[0] * parts, x.shape[1] // parts, *x.shape[2:])

    losses = token_losses(
        split_context(hidden), embedding, split_context(batch.targets), split_context(batch.weights), config
    )
    return TokenLosses(*(x.reshape(batch.targets.shape) for x in losses))


def gradients(
    objective: Objective, trainable: Variables, frozen: Variables, batches: Any, key: Array | None
) -> tuple[Variables, LossStats]:
    """Return the gradients of the mean loss per target over all micro-batches, and the sums behind it.

    Args:
        batches: micro-batches stacked along a new first axis. Their sum is divided once, by the number of all targets,
            so that a target weighs the same in a micro-batch with few as in one with many.
    """
    grad_fn = jax.grad(objective, has_aux=True)

    def key_of(i):
        return None if key is None else jax.random.fold_in(key, i)

    count = jax.tree.leaves(batches)[0].shape[0]
    if count == 1:
        total, stats = grad_fn(trainable, frozen, jax.tree.map(lambda x: x[0], batches), key_of(0))
    else:

        def add(carry, numbered):
            i, batch = numbered
            return jax.tree.map(jnp.add, carry, grad_fn(trainable, frozen, batch, key_of(i))), None

        zeros = jax.tree.map(jnp.zeros_like, trainable), LossStats(*[jnp.zeros(())] * len(LossStats._fields))
        (total, stats), _ = jax.lax.scan(add, zeros, (jnp.arange(count), batches))
    share = 1.0 / jnp.maximum(stats.weight, 1.0)
    return jax.tree.map(lambda x: x * share, total), stats


def train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    frozen: Variables,
    batches: Any,
    key: Array | None,
) -> tuple[TrainState, Metrics]:
    """Return the state after one update, and its metrics; to be jitted, with `state` donated.

    Args:
        batches: micro-batches stacked along a new first axis.
        key: base dropout key; the step is folded in. None is no dropout.
    """
    step_key = None if key is None else jax.random.fold_in(key, state.step)
    grads, stats = gradients(objective, state.trainable, frozen, batches, step_key)
    with jax.named_scope("optimizer"):
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.trainable)
        trainable: Any = optax.apply_updates(state.trainable, updates)
    weight = jnp.maximum(stats.weight, 1.0)
    metrics = Metrics(
        stats.loss / weight, -stats.log_probability / weight, stats.correct / weight, stats.weight,
        optax.tree.norm(grads),
    )  # fmt: skip
    return TrainState(state.step + 1, trainable, optimizer_state), metrics


def compiler_options(device: Any) -> dict[str, str | bool] | None:
    """Return XLA's compiler options for a step on such devices.

    On TPUs, the gradient of a sharded weight is one matmul and one reduction: XLA's windowed einsum would cut the
    low-rank LoRA matmuls into eighths, which leave most of the MXU idle. On v6e, weights are gathered while matmuls are
    computed, which is not the default there, and matmuls take 64 of its 128 MiB of VMEM, so they read their operands
    less often.
    """
    if device.platform != "tpu":
        return None
    options: dict[str, str | bool] = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
    return options | _CHIP_OPTIONS.get(chip_name(device.device_kind), {})


def initial_state(trainable: Variables, optimizer: optax.GradientTransformation) -> TrainState:
    """Return the state before the first step, sharded like the parameters."""
    masters = jax.tree.map(lambda x: x.astype(jnp.float32), trainable)
    return TrainState(jnp.zeros((), jnp.int32), masters, optimizer.init(masters))


def abstract(tree: Any) -> Any:
    """Return the shapes, dtypes and shardings of a tree of arrays, which keep no array alive."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def dropout_key(seed: int) -> Array:
    """Return a run's base dropout key: RBG, which is almost free and reproducible on the same hardware."""
    return jax.random.key(seed, impl="rbg")
