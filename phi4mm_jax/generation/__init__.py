"""From logits to text: sampling and the decoding loop."""

from phi4mm_jax.generation.generate import Completion, Generator
from phi4mm_jax.generation.sampling import Sampling

__all__ = ["Completion", "Generator", "Sampling"]
