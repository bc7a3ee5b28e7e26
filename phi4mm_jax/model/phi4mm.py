"""The assembly: encode the media, put them into the sequence, decode."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, Shaped

from phi4mm_jax.adapters import USERS
from phi4mm_jax.batch import AudioStack, Batch, ImageStack
from phi4mm_jax.config import Phi4MMConfig
from phi4mm_jax.kernels.pages import as_floats
from phi4mm_jax.kernels.ring import from_zigzag, to_zigzag
from phi4mm_jax.mesh import constrain, context_size, replicate
from phi4mm_jax.model import lora, rope
from phi4mm_jax.model.decoder import AttentionInputs, BlockConfig, Decoder
from phi4mm_jax.model.kv_cache import KVCache, cached_inputs
from phi4mm_jax.model.layers import Projector, Remat
from phi4mm_jax.model.speech import HALO_FRAMES, SpeechEncoder
from phi4mm_jax.model.vision import ImageEmbedder, VisionTower

MediaFeatures = Shaped[Array, "M D"]  # as pages hold them, see `kernels.pages`


class Phi4MM(nn.Module):
    """Phi-4-multimodal. `apply(variables, batch)` gives the logits; with `rngs={"dropout": key}` as in training.

    Attributes:
        dtype: of the activations; float32 or bfloat16. Parameters are cast to it where they are used.
        scan: whether the decoder's layers are one loop over stacked parameters, or are written out.
        scan_encoders: likewise those of the two encoders.
        remat: what the backward pass computes again of each layer: "none"; all of it ("full"); all but attention and
            its projections ("attention"); or all but the matrix products that it needs ("dots").
    """

    config: Phi4MMConfig
    dtype: Any = jnp.bfloat16
    scan: bool = True
    scan_encoders: bool = True
    remat: Remat = "none"

    def setup(self):
        config = self.config
        loras = tuple(lora.lora_configs(config).items())
        self.decoder = Decoder(BlockConfig(config.decoder, loras), self.scan, self.remat)
        if config.has_vision:
            self.vision = VisionTower(config.vision, self.scan_encoders, self.remat)
            self.image_embedder = ImageEmbedder({"D": config.vision.embed_dim, "E": config.decoder.embed_dim})
        if config.has_speech:
            self.speech = SpeechEncoder(config.speech, self.scan_encoders, self.remat)
            sizes = {"D": config.speech.embed_dim, "E": config.decoder.embed_dim}
            self.audio_projector = Projector(sizes)
            self.audio_projector_with_images = Projector(sizes)

    def __call__(self, batch: Batch) -> Float[Array, "B T V"]:
        return self.logits(self.hidden(batch))

    def hidden(self, batch: Batch) -> Float[Array, "B T D"]:
        """The decoder's output for whole rows, before the head."""
        features = self.encode(batch.images, batch.audio)
        embedded = constrain(self.embed(to_zigzag(batch.tokens), to_zigzag(batch.media), features), "batch", "length")
        return from_zigzag(self.decode(embedded, batch.lengths, batch.adapters, segments=batch.segments)[0])

    def encode(self, images: ImageStack | None, audio: AudioStack | None) -> MediaFeatures | None:
        """The table that `Batch.media` indexes: embeddings of all crops, of the separators, of all chunks."""
        tables = [] if images is None else [self.encode_images(images)]
        tables += [] if audio is None else [self.encode_audio(audio)]
        return jnp.concatenate(tables) if tables else None

    def encode_images(self, images: ImageStack) -> MediaFeatures:
        """Return the embeddings of crops, one crop after the other, then of the two separators: (M, D)."""
        features = self.vision(images.crops.astype(self.dtype), images.patch_mask)
        return self.image_embedder(features.reshape(-1, features.shape[-1]))

    def encode_audio(self, audio: AudioStack) -> MediaFeatures:
        """Return the embeddings of chunks of clips, one chunk after the other: (M, D)."""
        features = self.speech(audio.frames, audio.first, audio.last, audio.attended, self.dtype)  # (A, T, D)
        projected = self._project_audio(features, audio.with_images)
        return projected.reshape(-1, projected.shape[-1])

    def _project_audio(self, features: Float[Array, "A T D"], with_images: Bool[Array, " A"]) -> Float[Array, "A T E"]:
        """Project each chunk by its projector; the other's products are left out where no chunk needs them."""

        def alone(model, features):
            return model.audio_projector(features)

        def beside(model, features):
            return model.audio_projector_with_images(features)

        def both(model, features):
            return jnp.where(with_images[:, None, None], beside(model, features), alone(model, features))

        # Parameters must be declared outside of a branch, and what is captured is that of both.
        if self.is_initializing() or self.is_mutable_collection("intermediates"):
            return both(self, features)
        needed = jnp.where(with_images.all(), 1, jnp.where(with_images.any(), 2, 0))
        return nn.switch(needed, (alone, beside, both), self, features)

    def embed(
        self, tokens: Int[Array, "B T"], media: Int[Array, "B T"], features: MediaFeatures | None
    ) -> Float[Array, "B T D"]:
        """Embed tokens; those that `media` has a row of `features` for, not `NO_MEDIA`, are that row."""
        embedded = self.decoder.embed(tokens, self.dtype)
        if features is None:
            return embedded
        placed = constrain(as_floats(replicate(features)[jnp.maximum(media, 0)], None, self.dtype), "batch", "length")
        return jnp.where((media >= 0)[..., None], placed, embedded)

    def decode(
        self,
        embedded: Float[Array, "B T D"],
        lengths: Int[Array, " B"],
        adapters: Int[Array, " B"],
        long: Bool[Array, " B"] | None = None,
        cache: KVCache | None = None,
        starts: Int[Array, " B"] | None = None,
        tables: Int[Array, "B M"] | None = None,
        segments: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """Run the decoder over new tokens: over whole rows, or with a cache over what comes after its tokens.

        Args:
            lengths: valid tokens of each row, those of this call and those in the cache included.
            long: which rows use the long rotary set; by default those whose length asks for it. It must be what the
                row's cached keys were made with.
            starts: tokens of each row in the cache; a multiple of the page size where T is a multiple of it.
            tables: the pages of each row, in the order of its tokens.
            segments: of packed rows, which are taken whole: the sample that each token belongs to.
        """
        before = jnp.zeros_like(lengths) if starts is None else starts
        positions, sizes = before[:, None] + jnp.arange(embedded.shape[1]), lengths
        if segments is not None:
            positions, sizes = rope.within_segments(segments)
        settings = self.config.decoder.rope
        long = rope.is_long(settings, sizes) if long is None else long
        if cache is None and context_size() > 1:
            if segments is None:
                segments = (positions < lengths[:, None]).astype(jnp.int32)
            positions, segments = to_zigzag(positions), to_zigzag(segments)
            long = to_zigzag(long) if long.ndim == 2 else long
        cos, sin = rope.widen(*rope.rotations(settings, positions, long), self.config.decoder.head_size)
        cached = None
        if cache is not None and starts is not None and tables is not None:
            cached = cached_inputs(cache, starts, lengths, tables, embedded.shape[1])
        scales = lora.row_scales(self.config, adapters, USERS in self.variables)
        rows = AttentionInputs(lengths, cos, sin, scales, cached, segments)
        return self.decoder(embedded, rows, cache)

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Return the logits in float32, by the tied embedding."""
        return self.decoder.logits(hidden)


def abstract_batch(config: Phi4MMConfig, batch: int = 1, length: int = 16, crops: int = 1, chunks: int = 1) -> Batch:
    """Shapes of a batch with all modalities that the model has, to initialise or compile with."""
    vision, speech = config.vision, config.speech

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype)

    side, patches = vision.crop_size, vision.patches_per_side
    images = ImageStack(array(jnp.float32, crops, side, side, 3), array(jnp.bool_, crops, patches, patches))
    audio = AudioStack(
        frames=array(jnp.float32, chunks, HALO_FRAMES + 4 * speech.time_reduction, speech.num_bands),
        first=array(jnp.int32, chunks), last=array(jnp.int32, chunks), attended=array(jnp.int32, chunks),
        with_images=array(jnp.bool_, chunks),
    )  # fmt: skip
    return Batch(
        tokens=array(jnp.int32, batch, length),
        lengths=array(jnp.int32, batch),
        adapters=array(jnp.int32, batch),
        media=array(jnp.int32, batch, length),
        images=images if config.has_vision else None,
        audio=audio if config.has_speech else None,
    )


def abstract_variables(model: Phi4MM) -> Any:
    """Shapes of all variables, boxed with their logical axes; takes no memory."""
    return jax.eval_shape(model.init, jax.random.key(0), abstract_batch(model.config))
