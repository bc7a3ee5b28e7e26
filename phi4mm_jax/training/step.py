"""Training step: gradients of the trainable parameters alone, summed over micro-batches, and one update."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from phi4mm_jax.batch import TrainingBatch
from phi4mm_jax.mesh import context_size, split_batch
from phi4mm_jax.model import Phi4MM
from phi4mm_jax.training.losses import LossConfig, TokenLosses, token_losses
from phi4mm_jax.training.param_filter import join

Variables = dict[str, Any]


class TrainState(NamedTuple):
    """State of training, which a step changes.

    The trainable parameters are float32 whatever the model computes in, which casts them where it uses them: so small
    updates are not lost.
    """

    step: Int[Array, ""]  # updates made
    trainable: Variables
    optimizer: Any


class Sums(NamedTuple):
    """Sums over the positions of a batch that have a weight. What is minimised is loss / weight."""

    loss: Float[Array, ""]
    weight: Float[Array, ""]
    log_probability: Float[Array, ""]
    correct: Float[Array, ""]


class Metrics(NamedTuple):
    """Metrics of one step."""

    loss: Float[Array, ""]  # what is minimised, a target token
    cross_entropy: Float[Array, ""]  # without smoothing and z-loss
    accuracy: Float[Array, ""]  # the share of targets that were the likeliest token
    targets: Float[Array, ""]  # weight of all targets
    gradient_norm: Float[Array, ""]  # before clipping


Objective = Callable[[Variables, Variables, Any, Array | None], tuple[Float[Array, ""], Sums]]


def supervised(model: Phi4MM, config: LossConfig = LossConfig()) -> Objective:  # noqa: B008 (frozen)
    """Return the objective of given answers: their summed cross-entropy."""

    def objective(trainable: Variables, frozen: Variables, batch: TrainingBatch, key: Array | None):
        losses = losses_of(model, trainable, frozen, batch, config, key)
        weights = jnp.asarray(batch.weights, jnp.float32)
        total, log_probability, correct = (jnp.sum(x * weights) for x in losses)
        return total, Sums(total, weights.sum(), log_probability, correct)

    return objective


def losses_of(
    model: Phi4MM, trainable: Variables, frozen: Variables, batch: TrainingBatch, config: LossConfig, key: Array | None
) -> TokenLosses:
    """Return the losses of a batch's positions; with a key, adapters drop out."""
    # Cast before they are spread over the devices' layers: half of the bytes.
    variables = join(jax.tree.map(lambda x: x.astype(model.dtype), trainable), frozen)
    rngs = None if key is None else {"dropout": key}
    apply: Callable[..., Any] = model.apply
    with split_batch():
        hidden, parts = apply(variables, batch.batch, method="hidden", rngs=rngs), context_size()
    # Of the head not the cast one: its gradient is a sum over all positions, which float32 has room for.
    embedding = join(trainable, frozen)["params"]["decoder"]["embedding"]

    def dealt(x):  # the parts of a row that devices share are rows to the loss
        return x.reshape(x.shape[0] * parts, x.shape[1] // parts, *x.shape[2:])

    found = token_losses(dealt(hidden), embedding, dealt(batch.targets), dealt(batch.weights), config)
    return TokenLosses(*(x.reshape(batch.targets.shape) for x in found))


def gradients(
    objective: Objective, trainable: Variables, frozen: Variables, batches: Any, key: Array | None
) -> tuple[Variables, Sums]:
    """Return the gradients of the mean loss a target, of all micro-batches together, and the sums behind it.

    Args:
        batches: micro-batches stacked along a new first axis. A sum over them is divided once, by all targets: a
            target counts as much in a micro-batch with few as in one with many.
    """
    of_one = jax.grad(objective, has_aux=True)

    def key_of(i):
        return None if key is None else jax.random.fold_in(key, i)

    count = jax.tree.leaves(batches)[0].shape[0]
    if count == 1:
        total, sums = of_one(trainable, frozen, jax.tree.map(lambda x: x[0], batches), key_of(0))
    else:

        def add(carry, numbered):
            i, batch = numbered
            return jax.tree.map(jnp.add, carry, of_one(trainable, frozen, batch, key_of(i))), None

        zeros = jax.tree.map(jnp.zeros_like, trainable), Sums(*[jnp.zeros(())] * len(Sums._fields))
        (total, sums), _ = jax.lax.scan(add, zeros, (jnp.arange(count), batches))
    share = 1.0 / jnp.maximum(sums.weight, 1.0)
    return jax.tree.map(lambda x: x * share, total), sums


def train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    frozen: Variables,
    batches: Any,
    key: Array | None,
) -> tuple[TrainState, Metrics]:
    """One update from micro-batches that are stacked along their first axis; to be compiled, with `state` donated.

    Args:
        key: of all draws of the run; the step is folded into it. None draws nothing: no adapter drops out.
    """
    own = None if key is None else jax.random.fold_in(key, state.step)
    found, sums = gradients(objective, state.trainable, frozen, batches, own)
    with jax.named_scope("optimizer"):
        updates, optimizer_state = optimizer.update(found, state.optimizer, state.trainable)
        trainable: Any = optax.apply_updates(state.trainable, updates)
    weight = jnp.maximum(sums.weight, 1.0)
    metrics = Metrics(
        sums.loss / weight, -sums.log_probability / weight, sums.correct / weight, sums.weight,
        optax.tree.norm(found),
    )  # fmt: skip
    return TrainState(state.step + 1, trainable, optimizer_state), metrics


def compiler_options(platform: str) -> dict[str, str | bool] | None:
    """Return XLA's options of a step on a platform.

    On TPUs the gradient of a split weight is one product and one sum over the devices: of adapters' low ranks XLA would
    else make products of an eighth of their rows, which leave most of the matrix unit idle.
    """
    return {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"} if platform == "tpu" else None


def initial_state(trainable: Variables, optimizer: optax.GradientTransformation) -> TrainState:
    """Return the state before the first step, sharded as the parameters are."""
    masters = jax.tree.map(lambda x: x.astype(jnp.float32), trainable)
    return TrainState(jnp.zeros((), jnp.int32), masters, optimizer.init(masters))


def dropout_key(seed: int) -> Array:
    """Return the key of a run's dropout.

    Its bits are drawn by the hardware where it can: they cost next to nothing, and repeat on the same chips.
    """
    return jax.random.key(seed, impl="rbg")
