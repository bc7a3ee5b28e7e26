"""Norms of arrays and of trees of them, on the host, where no shape is compiled."""

import jax
import numpy as np


def norm(tree) -> float:
    """Norm of all leaves together."""
    return float(np.linalg.norm([np.linalg.norm(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)]))


def distance(found, expected) -> float:
    """Norm of the difference of all leaves, over that of what is expected."""
    found, expected = (
        jax.tree.map(lambda x: np.asarray(x, np.float64), jax.device_get(tree)) for tree in (found, expected)
    )
    return norm(jax.tree.map(np.subtract, found, expected)) / norm(expected)
