"""Products of linear maps: their numbers, and how one CPU computes them."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phi4mm_jax.mesh import make_mesh
from phi4mm_jax.model.layers import gelu_tanh, layer_norm, rms_norm
from phi4mm_jax.precision import einsum

SIZES = {"B": 2, "T": 5, "D": 24, "N": 3, "H": 8, "F": 20, "R": 4, "U": 2, "W": 3, "C": 6, "V": 11, "S": 7}
LINEAR = ("BTD,DNH->BTNH", "BTNH,NHD->BTD", "BTD,DF->BTF", "BTWC,WCD->BTD", "BTUR,URNH->BTNH", "BTV,BTD->VD")
OTHERS = ("BTD,VD->BTV", "BTR,UDR->BTUD", "BTNH,BSNH->BNTS")


def operands(equation: str, scale: float = 1.0) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [scale * rng.standard_normal([SIZES[n] for n in x]) for x in equation.split("->")[0].split(",")]


@pytest.mark.parametrize("on_mesh", [False, True])
@pytest.mark.parametrize("equation", [*LINEAR, *OTHERS])
def test_products_and_their_gradients(equation, on_mesh):
    """They are those of float64, on one CPU and on a mesh."""
    x, kernel = operands(equation)
    pair, out = equation.split("->")
    names, others = pair.split(",")
    shape = [SIZES[n] for n in out]
    seed = np.random.default_rng(1).standard_normal(shape)

    def total(x, kernel):
        found = einsum(equation, x, kernel)
        return (found * jnp.asarray(seed, jnp.float32)).sum(), found

    compute = jax.jit(jax.grad(total, (0, 1), has_aux=True))
    given = jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32)
    if on_mesh:
        with jax.set_mesh(make_mesh(fsdp=2)):
            gradients, found = compute(*given)
    else:
        gradients, found = compute(*given)
    wanted = (
        np.einsum(equation, x, kernel),
        (
            np.einsum(f"{out},{others}->{names}", seed, kernel),
            np.einsum(f"{names},{out}->{others}", x, seed),
        ),
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), (found, gradients), wanted)


@pytest.mark.parametrize("equation", LINEAR[:5])
def test_one_cpu_transposes_no_operand_of_a_linear_map(equation):
    """Neither forward nor for the gradients of both operands."""
    given = [jnp.asarray(x, jnp.float32) for x in operands(equation)]
    compute = jax.jit(jax.grad(lambda x, kernel: (einsum(equation, x, kernel) ** 2).sum(), (0, 1)))
    text: Any = compute.lower(*given).compile().as_text()
    assert not re.search(r" (transpose|copy)\(", text)


def test_the_gradient_of_a_loop_saves_no_second_copy_of_kernels():
    """Kernels that a loop takes from stacks are saved in their own shape, which is there already."""
    kernels, x = jnp.ones((3, 24, 3, 8)), jnp.ones((2, 5, 24))

    def loss(x, kernels):
        def layer(x, kernel):
            return x + einsum("BTD,DNH->BTNH", x, kernel).reshape(x.shape), None

        return jax.lax.scan(layer, x, kernels)[0].sum()

    text: Any = jax.jit(jax.grad(loss)).lower(x, kernels).compile().as_text()
    assert "f32[3,24,3,8]" in text
    assert "f32[3,24,24]" not in text


@pytest.mark.torch
def test_norms_in_bfloat16_round_as_pytorchs():
    import torch
    from transformers.models.phi4_multimodal.modeling_phi4_multimodal import Phi4MultimodalRMSNorm

    rng = np.random.default_rng(0)
    x, scale, bias = (rng.normal(1, 0.5, shape).astype(np.float32) for shape in ((64, 96), 96, 96))
    given, weight, offset = (torch.tensor(value).bfloat16() for value in (x, scale, bias))
    a, b, c = (jnp.asarray(value, jnp.bfloat16) for value in (x, scale, bias))
    rms = Phi4MultimodalRMSNorm(96, eps=1e-5)
    rms.weight.data = weight
    layer = torch.nn.functional.layer_norm(given, (96,), weight, offset, 1e-5)
    for found, wanted in (
        (rms_norm(a, b, 1e-5), rms(given)), (layer_norm(a, b, c, 1e-5), layer),
        (gelu_tanh(a), torch.nn.functional.gelu(given, approximate="tanh")),
    ):  # fmt: skip
        same = np.asarray(found, np.float32) == wanted.detach().float().numpy()
        assert same.mean() > 0.99  # a sum in another order may fall on the other side of a rounding
