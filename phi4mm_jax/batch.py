"""Static-shaped batch: the contract between processor and model.

Crops and clips of all rows lie in two padded stacks. The model turns both stacks into one table of features; `media`
tells for each position of the sequence which row of that table it takes. So the model knows nothing of images, clips
or token ids, and a batch may mix modalities at will. Made of numpy arrays; the network takes any, shapes included.
"""

from typing import Any, NamedTuple

from jaxtyping import Bool, Float, Int

NO_MEDIA = -1


class ImageStack(NamedTuple):
    """Crops of all images. Their features: 256 a crop, then the two separators (of rows; of the global view)."""

    crops: Float[Any, "C 448 448 3"]  # normalised: sub-crops in [-1, 1], global views in [-1.9, 1.9]
    patch_mask: Bool[Any, "C 32 32"]  # False: padding, not attended to


class AudioStack(NamedTuple):
    """Chunks of all clips. Their features: F / 8 - 1 a chunk.

    A chunk holds 8 frames from before it (so that the convolutions see what they see in the whole clip), then its own
    frames, then padding.
    """

    frames: Float[Any, "A F 80"]  # log-mel
    first: Int[Any, " A"]  # the first frame that belongs to the clip: 8 at the clip's beginning, else 0
    last: Int[Any, " A"]  # one past the last frame that belongs to the clip
    attended: Int[Any, " A"]  # tokens of the chunk that are attended to
    with_images: Bool[Any, " A"]  # whether the clip's prompt has images too: another projector


class Batch(NamedTuple):
    """B rows of T positions, left-aligned."""

    tokens: Int[Any, "B T"]  # padded with the pad token
    lengths: Int[Any, " B"]
    adapters: Int[Any, " B"]  # of each row: `Adapter.index`, or 0 for none
    media: Int[Any, "B T"]  # row of the features, or NO_MEDIA: the token's own embedding
    images: ImageStack | None
    audio: AudioStack | None
    segments: Int[Any, "B T"] | None = None  # packed rows: which sample a token belongs to, from 1 on; 0 for padding


class TrainingBatch(NamedTuple):
    """B rows of T positions; a row holds one sample, or several after one another, which do not see each other."""

    batch: Batch
    targets: Int[Any, "B T"]  # the token that follows each position in its sample; any where the weight is 0
    weights: Float[Any, "B T"]  # how much a position's loss counts: 1 where its target is part of an answer, else 0
