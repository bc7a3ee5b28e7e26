"""The mesh, and the table from logical axes to mesh axes."""

from typing import Any

import jax
from flax import linen as nn
from flax.traverse_util import flatten_dict
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding

RULES: tuple[tuple[str, str | None], ...] = (  # logical axis of a parameter -> mesh axis
    ("vocab", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("channels", "tensor"),
    ("embed", "fsdp"),
    ("embed_out", None),
    ("head", None),
    ("rank", None),
    ("layers", None),
)


def make_mesh(fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh of fsdp * tensor devices, with automatic axes.

    fsdp splits every weight along its embedding axis; tensor splits heads, MLP and vocabulary.
    """
    return jax.make_mesh((fsdp, tensor), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)


def shardings(abstract: Any, mesh: Mesh | None) -> dict[tuple[str, ...], jax.sharding.Sharding]:
    """Where each parameter lies, by path; on the first device without a mesh.

    An axis that its mesh axis does not divide is not split.
    """
    boxed = flatten_dict(abstract, is_leaf=lambda _, x: not isinstance(x, dict))
    if mesh is None:
        return dict.fromkeys(boxed, SingleDeviceSharding(jax.devices()[0]))
    table = dict(RULES)

    def spec(leaf) -> NamedSharding:
        axes = leaf.names if isinstance(leaf, nn.Partitioned) else (None,) * leaf.ndim
        shape = nn.unbox(leaf).shape
        mapped = [table[a] if a is not None else None for a in axes]
        return NamedSharding(
            mesh,
            jax.P(*(
                m if m in mesh.shape and n % mesh.shape[m] == 0 else None for m, n in zip(mapped, shape, strict=True)
            )),
        )  # fmt: skip

    return {path: spec(leaf) for path, leaf in boxed.items()}
