"""Partial results of attention, of parts of the keys, and their sum."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def merge_partials(
    o: Float[Array, "X B N H"],
    m: Float[Array, "X B N"],
    l: Float[Array, "X B N"],  # noqa: E741
) -> tuple[Float[Array, "B N H"], Float[Array, "B N"], Float[Array, "B N"]]:
    """Merge the partial results of X parts of the keys; the attention is then o / l[..., None].

    Across devices, gather each of the three first: `jax.lax.all_gather(o, axis)`.
    """
    greatest = m.max(0)
    weights = jnp.exp(m - jnp.where(jnp.isfinite(greatest), greatest, 0.0))
    return (o * weights[..., None]).sum(0), greatest, (l * weights).sum(0)
