"""Partial results of attention over parts of the keys: their computation on a mesh, and their merging."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from phi4mm_jax.mesh import Axes, over_mesh

Partials = tuple[Float[Array, "*B N H"], Float[Array, "*B N"], Float[Array, "*B N"]]  # (o, m, l): sums, maxima, weights
Output = tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]  # and its log-sum-exp, -inf without keys


def decode_over_mesh(kernel: Callable[..., Partials], q, k, v, layer, lengths, tables, scales) -> Partials:
    """Compute (o, m, l) of decoding by a kernel, heads split over the mesh in context."""
    of_q, of_pages = Axes(None, "heads", None), Axes(None, None, "heads", None, None)
    of_tables, of_lengths = None if tables is None else Axes(None, None), Axes(*[None] * lengths.ndim)
    return over_mesh(
        kernel,
        (q, k, v, layer, lengths, tables, scales),
        (of_q, of_pages, of_pages, Axes(), of_lengths, of_tables, scales and (Axes(*of_pages[:4]),) * 2),
        (of_q, Axes(None, "heads"), Axes(None, "heads")),
        rows=1,
        heads=k.shape[2],
    )


def merge_partials(
    o: Float[Array, "X *B N H"],
    m: Float[Array, "X *B N"],
    l: Float[Array, "X *B N"],  # noqa: E741
) -> Partials:
    """Merge the partial results of X parts of the keys; the attention is then o / l[..., None].

    Across devices, gather each of the three first: `jax.lax.all_gather(o, axis)`.
    """
    greatest = m.max(0)
    weights = jnp.exp(m - jnp.where(jnp.isfinite(greatest), greatest, 0.0))
    return (o * weights[..., None]).sum(0), greatest, (l * weights).sum(0)


def merge_outputs(one: Output, other: Output) -> Output:
    """Merge the attention to some keys with that to others, all in float32.

    Differentiable where a query has a key of either.
    """
    both = jnp.logaddexp(one[1], other[1])
    weight, other_weight = (jnp.where(jnp.isfinite(x), jnp.exp(x - both), 0.0)[..., None] for x in (one[1], other[1]))
    return one[0] * weight + other[0] * other_weight, both


def merge_devices(out: Float[Array, "B T N H"], lse: Float[Array, "B T N"], axis: str) -> Float[Array, "B X N H"]:
    """Merge what the devices of a mesh axis attended to, in float32; each keeps its share of the T queries."""
    greatest = jax.lax.pmax(lse, axis)
    weight = jnp.where(jnp.isfinite(lse), jnp.exp(lse - jnp.where(jnp.isfinite(greatest), greatest, 0.0)), 0.0)
    weighted, total = (
        jax.lax.psum_scatter(x, axis, scatter_dimension=1, tiled=True) for x in (out * weight[..., None], weight)
    )
    return weighted / jnp.where(total > 0, total, 1.0)[..., None]
