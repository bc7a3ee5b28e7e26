"""Gradients beside the goldens'."""

from collections.abc import Mapping

import numpy as np

from helpers.norms import distance

# The gradient of a key's bias is rounding alone: a softmax does not see what is added to all scores of a query. What
# is seen, on processors with and without AVX-512 and in PyTorch, is up to 7e-6 of the query bias's gradient.
_ROUNDING = 2e-5
_BIASES = {"k_proj.bias": "q_proj.bias", "linear_k.bias": "linear_q.bias"}


def assert_gradients_are_golden(
    gradients: Mapping[str, np.ndarray], goldens: Mapping[str, np.ndarray], case: str, norms: float = 1e-3
) -> None:
    """Compare each gradient that a case of the goldens has, whole or as its norm.

    Args:
        gradients: by the names of the original checkpoint.
        norms: relative tolerance of the norms.
    """
    whole, recorded = (
        {name.removeprefix(prefix): golden for name, golden in goldens.items() if name.startswith(prefix)}
        for prefix in (f"{case}.grad.", f"{case}.gradnorm.")
    )
    assert whole
    assert recorded
    for name, golden in whole.items():
        assert distance(gradients[name], golden) <= 3e-4, name
    for name, (norm,) in recorded.items():
        bound = norms * norm
        for key, query in _BIASES.items():
            if name.endswith(key):
                bound = _ROUNDING * recorded[name.removesuffix(key) + query].item()
        assert abs(np.linalg.norm(gradients[name]) - norm) <= bound, name
