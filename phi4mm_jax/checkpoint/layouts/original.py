"""The weight table of the original layout (`model_type: phi4mm`)."""

from collections.abc import Iterator

from phi4mm_jax.adapters import ADAPTERS
from phi4mm_jax.checkpoint.tensor_types import Shape, Tensor, linear, part, tensor, unused
from phi4mm_jax.config import Phi4MMConfig

_IMAGE = "model.embed_tokens_extend.image_embed"
_AUDIO = "model.embed_tokens_extend.audio_embed"


def original_table(config: Phi4MMConfig) -> list[Tensor]:
    """Every tensor of the main shards. The adapters' folders repeat some of them: see `native.adapter_table`."""
    vision, speech = (_vision(config) if config.has_vision else ()), (_speech(config) if config.has_speech else ())
    return [*_decoder(config), *vision, *speech]


def _decoder(config: Phi4MMConfig) -> Iterator[Tensor]:
    d = config.decoder
    D, N, K, H, F = d.embed_dim, d.num_heads, d.num_kv_heads, d.head_size, d.mlp_dim
    fused = {  # original name: (our module, outputs by part, inputs)
        "self_attn.qkv_proj": ("attention/qkv", {"q": (N, H), "k": (K, H), "v": (K, H)}, (D,)),
        "self_attn.o_proj": ("attention/out", {"out": (D,)}, (N, H)),
        "mlp.gate_up_proj": ("mlp/gate_up", {"gate": (F,), "up": (F,)}, (D,)),
        "mlp.down_proj": ("mlp/down", {"down": (D,)}, (F,)),
    }
    # PEFT's name for a weight that an adapter is added to; merged into it, the adapter leaves none behind.
    own = ".base_layer" if config.loras else ""
    yield tensor("model.embed_tokens.weight", (d.vocab_size, D), part("params/decoder/embedding", (d.vocab_size, D)))
    yield tensor("model.norm.weight", (D,), part("params/decoder/norm/scale", (D,)))
    for i in range(d.num_layers):
        base = f"model.layers.{i}"
        for theirs, ours in (("input_layernorm", "attention_norm"), ("post_attention_layernorm", "mlp_norm")):
            yield tensor(f"{base}.{theirs}.weight", (D,), part(f"params/decoder/layers/{ours}/scale", (D,)), layer=i)
        for theirs, (ours, outputs, inputs) in fused.items():
            rows, columns = sum(_size(o) for o in outputs.values()), _size(inputs)
            module = f"decoder/layers/{ours}"
            yield tensor(
                f"{base}.{theirs}{own}.weight",
                (rows, columns),
                *(linear(f"params/{module}/{name}", out, inputs) for name, out in outputs.items()),
                layer=i,
            )
            for kind, lora in config.loras.items():
                collection = ADAPTERS[kind].collection
                a = linear(f"{collection}/{module}/a", (lora.rank,), inputs)
                bs = (linear(f"{collection}/{module}/{n}", out, (lora.rank,)) for n, out in outputs.items())
                yield tensor(f"{base}.{theirs}.lora_A.{kind}.weight", (lora.rank, columns), a, layer=i)
                yield tensor(f"{base}.{theirs}.lora_B.{kind}.weight", (rows, lora.rank), *bs, layer=i)


def _vision(config: Phi4MMConfig) -> Iterator[Tensor]:
    v, E = config.vision, config.decoder.embed_dim
    D, N, H, F, S = v.embed_dim, v.num_heads, v.head_size, v.mlp_dim, v.patches_per_side**2
    p = v.patch_size
    tower = f"{_IMAGE}.img_processor"
    kernel = part("params/vision/patch_kernel", (D, 3, p, p), (2, 3, 1, 0))
    yield tensor(f"{tower}.embeddings.patch_embedding.weight", (D, 3, p, p), kernel)
    yield tensor(f"{tower}.embeddings.patch_embedding.bias", (D,), part("params/vision/patch_bias", (D,)))
    yield tensor(f"{tower}.embeddings.position_embedding.weight", (S, D), part("params/vision/position", (S, D)))
    linears = {
        "self_attn.q_proj": ("q", (N, H), (D,)),
        "self_attn.k_proj": ("k", (N, H), (D,)),
        "self_attn.v_proj": ("v", (N, H), (D,)),
        "self_attn.out_proj": ("out", (D,), (N, H)),
        "mlp.fc1": ("up", (F,), (D,)),
        "mlp.fc2": ("down", (D,), (F,)),
    }
    norms = {"layer_norm1": "attention_norm", "layer_norm2": "mlp_norm"}
    for i in range(v.num_layers + 1):
        base = f"{tower}.encoder.layers.{i}"
        layer = list(_block(base, "params/vision/layers", linears, norms, D, i))
        # The features are taken before the last layer, which is in the files but never runs.
        yield from layer if i < v.num_layers else (unused(t.name, t.shape) for t in layer)
    for name, shape in {
        "post_layernorm.weight": (D,),
        "post_layernorm.bias": (D,),
        "head.probe": (1, 1, D),
        "head.attention.in_proj_weight": (3 * D, D),
        "head.attention.in_proj_bias": (3 * D,),
        "head.attention.out_proj.weight": (D, D),
        "head.attention.out_proj.bias": (D,),
        "head.layernorm.weight": (D,),
        "head.layernorm.bias": (D,),
        "head.mlp.fc1.weight": (F, D),
        "head.mlp.fc1.bias": (F,),
        "head.mlp.fc2.weight": (D, F),
        "head.mlp.fc2.bias": (D,),
    }.items():
        yield unused(f"{tower}.{name}", shape)  # the pooling head never runs either

    yield tensor(f"{_IMAGE}.glb_GN", (1, 1, D), part("params/image_embedder/global_separator", (D,)))
    yield tensor(f"{_IMAGE}.sub_GN", (1, 1, 1, D), part("params/image_embedder/row_separator", (D,)))
    yield from _projector(f"{_IMAGE}.img_projection", "params/image_embedder/projector", D, E)


def _speech(config: Phi4MMConfig) -> Iterator[Tensor]:
    s = config.speech
    D, N, H, F, C, W = s.embed_dim, s.num_heads, s.head_size, s.mlp_dim, s.conv_channels, s.kernel_size
    encoder, bands = f"{_AUDIO}.encoder", s.subsampled_bands
    for theirs, ours in (("global_mean", "mean"), ("global_invstd", "inverse_deviation")):
        shape = (s.num_bands,)
        yield tensor(f"{encoder}.encoder_embedding.{theirs}", shape, part(f"params/speech/{ours}", shape))
    table = f"{encoder}.relative_attention_bias_layer.bias_values.weight"
    yield tensor(table, (2 * s.bias_distance, N), part("params/speech/bias", (2 * s.bias_distance, N)))

    stem = "params/speech/stem"
    for i, place in enumerate((0, 2, 5)):  # places in the sequence of convolutions and activations
        kernel = part(f"{stem}/conv_{i}", (C, 3, 3), (1, 2, 0))
        yield tensor(f"{encoder}.embed.conv.{place}.weight", (C, 1, 3, 3), kernel)
        yield tensor(f"{encoder}.embed.conv.{place}.bias", (C,), part(f"{stem}/conv_{i}_bias", (C,)))
    for i, place in ((1, 3), (2, 6)):
        yield tensor(f"{encoder}.embed.conv.{place}.weight", (C, C, 1, 1), linear(f"{stem}/mix_{i}/kernel", (C,), (C,)))
        yield tensor(f"{encoder}.embed.conv.{place}.bias", (C,), part(f"{stem}/mix_{i}/bias", (C,)))
    out = part(f"{stem}/out/kernel", (D, C, bands), (2, 1, 0))  # flattened channel-major
    yield tensor(f"{encoder}.embed.out.weight", (D, C * bands), out)
    yield tensor(f"{encoder}.embed.out.bias", (D,), part(f"{stem}/out/bias", (D,)))

    layers = "params/speech/layers"
    linears: dict[str, tuple[str, Shape, Shape]] = {f"self_attn.linear_{n}": (n, (N, H), (D,)) for n in "qkv"}
    linears["self_attn.linear_out"] = ("out", (D,), (N, H))
    norms = {"layer_norm_att": "attention_norm", "layer_norm": "norm", "conv.layer_norm": "conv/norm"}
    for theirs, ours in (("feed_forward_in", "mlp_in"), ("feed_forward_out", "mlp_out")):
        norms[f"{theirs}.layer_norm"] = f"{ours}/norm"
        linears[f"{theirs}.net.2"] = (f"{ours}/down", (D,), (F,))
    for i in range(s.num_layers):
        base = f"{encoder}.encoders.{i}"
        yield from _block(base, layers, linears, norms, D, i)
        gated = [(f"feed_forward_{w}.net.0.linear", f"mlp_{w}", F, ()) for w in ("in", "out")]
        for theirs, ours, width, window in (*gated, ("conv.glu.ext_pw_conv_1d", "conv", D, (1,))):
            names = [f"{layers}/{ours}/{gate}" for gate in ("value", "gate")]
            kernels = [linear(f"{n}/kernel", (width,), (D,)) for n in names]
            biases = [part(f"{n}/bias", (width,)) for n in names]
            yield tensor(f"{base}.{theirs}.weight", (2 * width, D, *window), *kernels, layer=i)
            yield tensor(f"{base}.{theirs}.bias", (2 * width,), *biases, layer=i)
        for b in ("b1", "b2"):
            yield tensor(f"{base}.conv.glu.{b}", (1, D, 1), part(f"{layers}/conv/{b}", (D,)), layer=i)
        depthwise = f"{base}.conv.dw_sep_conv_1d.dw_conv"
        yield tensor(f"{depthwise}.weight", (D, 1, W), part(f"{layers}/conv/depthwise", (D, W), (1, 0)), layer=i)
        yield tensor(f"{depthwise}.bias", (D,), part(f"{layers}/conv/depthwise_bias", (D,)), layer=i)
        for theirs, ours in (("conv.dw_sep_conv_1d.pw_conv", "mix"), ("conv.ext_pw_conv_1d", "out")):
            kernel = linear(f"{layers}/conv/{ours}/kernel", (D,), (D,))
            yield tensor(f"{base}.{theirs}.weight", (D, D, 1), kernel, layer=i)
            yield tensor(f"{base}.{theirs}.bias", (D,), part(f"{layers}/conv/{ours}/bias", (D,)), layer=i)

    E = config.decoder.embed_dim
    yield from _projector(f"{_AUDIO}.audio_projection.speech", "params/audio_projector", D, E)
    yield from _projector(f"{_AUDIO}.audio_projection.vision", "params/audio_projector_with_images", D, E)


def _block(base: str, layers: str, linears: dict, norms: dict[str, str], embed_dim: int, i: int) -> Iterator[Tensor]:
    """The plain linear maps and the norms of one layer."""
    for theirs, (ours, outputs, inputs) in linears.items():
        kernel = linear(f"{layers}/{ours}/kernel", outputs, inputs)
        yield tensor(f"{base}.{theirs}.weight", (_size(outputs), _size(inputs)), kernel, layer=i)
        yield tensor(f"{base}.{theirs}.bias", (_size(outputs),), part(f"{layers}/{ours}/bias", outputs), layer=i)
    for theirs, ours in norms.items():
        for their_name, our_name in (("weight", "scale"), ("bias", "bias")):
            scale = part(f"{layers}/{ours}/{our_name}", (embed_dim,))
            yield tensor(f"{base}.{theirs}.{their_name}", (embed_dim,), scale, layer=i)


def _projector(base: str, ours: str, inputs: int, outputs: int) -> Iterator[Tensor]:
    for place, name, width in ((0, "up", inputs), (2, "down", outputs)):
        yield tensor(f"{base}.{place}.weight", (outputs, width), linear(f"{ours}/{name}/kernel", (outputs,), (width,)))
        yield tensor(f"{base}.{place}.bias", (outputs,), part(f"{ours}/{name}/bias", (outputs,)))


def _size(shape: tuple[int, ...]) -> int:
    return shape[0] if len(shape) == 1 else shape[0] * shape[1]
