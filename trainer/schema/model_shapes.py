"""Every parameter of a model with its shape, from its sizes alone: what a whole file must hold.

Names are those of the published single files (for the text encoders those of transformers, CLIP without `text_model.`).
A test holds these tables against the modules themselves.
"""

from __future__ import annotations

from collections.abc import Iterator

from trainer.schema.checkpoint_header import AutoencoderParams, ClipParams, FluxParams, T5Params

Shape = tuple[int, ...]
TIME_EMBEDDING_DIM = 256


def flux_shapes(params: FluxParams) -> dict[str, Shape]:
    """The parameters of a FLUX.1 transformer."""
    dim = params.hidden_size
    head_dim = dim // params.num_heads
    mlp = round(dim * params.mlp_ratio)
    shapes: dict[str, Shape] = {}

    def linear(name: str, num_in: int, num_out: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = (num_out, num_in)
        if bias:
            shapes[f"{name}.bias"] = (num_out,)

    def head_norms(name: str) -> None:
        shapes[f"{name}.query_norm.scale"] = (head_dim,)
        shapes[f"{name}.key_norm.scale"] = (head_dim,)

    linear("img_in", params.in_channels, dim)
    linear("txt_in", params.context_in_dim, dim)
    embedders = [("time_in", TIME_EMBEDDING_DIM), ("vector_in", params.vec_in_dim)]
    if params.guidance_embed:
        embedders.append(("guidance_in", TIME_EMBEDDING_DIM))
    for name, num_in in embedders:
        linear(f"{name}.in_layer", num_in, dim)
        linear(f"{name}.out_layer", dim, dim)
    for index in range(params.depth):
        for stream in ("img", "txt"):
            block = f"double_blocks.{index}.{stream}"
            linear(f"{block}_mod.lin", dim, 6 * dim)
            linear(f"{block}_attn.qkv", dim, 3 * dim, params.qkv_bias)
            head_norms(f"{block}_attn.norm")
            linear(f"{block}_attn.proj", dim, dim)
            linear(f"{block}_mlp.0", dim, mlp)
            linear(f"{block}_mlp.2", mlp, dim)
    for index in range(params.depth_single_blocks):
        block = f"single_blocks.{index}"
        linear(f"{block}.modulation.lin", dim, 3 * dim)
        linear(f"{block}.linear1", dim, 3 * dim + mlp)
        linear(f"{block}.linear2", dim + mlp, dim)
        head_norms(f"{block}.norm")
    linear("final_layer.adaLN_modulation.1", dim, 2 * dim)
    linear("final_layer.linear", dim, params.out_channels)
    return shapes


def autoencoder_shapes(params: AutoencoderParams) -> dict[str, Shape]:
    """The parameters of a FLUX.1 autoencoder."""
    widths = [params.ch * factor for factor in params.ch_mult]
    last = len(widths) - 1
    shapes: dict[str, Shape] = {}

    def conv(name: str, num_in: int, num_out: int, kernel: int = 3) -> None:
        shapes[f"{name}.weight"] = (num_out, num_in, kernel, kernel)
        shapes[f"{name}.bias"] = (num_out,)

    def norm(name: str, channels: int) -> None:
        shapes[f"{name}.weight"] = (channels,)
        shapes[f"{name}.bias"] = (channels,)

    def resnet(name: str, num_in: int, num_out: int) -> None:
        norm(f"{name}.norm1", num_in)
        conv(f"{name}.conv1", num_in, num_out)
        norm(f"{name}.norm2", num_out)
        conv(f"{name}.conv2", num_out, num_out)
        if num_in != num_out:
            conv(f"{name}.nin_shortcut", num_in, num_out, 1)

    def middle(name: str, channels: int) -> None:
        resnet(f"{name}.block_1", channels, channels)
        norm(f"{name}.attn_1.norm", channels)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.attn_1.{part}", channels, channels, 1)
        resnet(f"{name}.block_2", channels, channels)

    conv("encoder.conv_in", params.in_channels, params.ch)
    for level, width in enumerate(widths):
        num_in = params.ch if level == 0 else widths[level - 1]
        for block in range(params.num_res_blocks):
            resnet(f"encoder.down.{level}.block.{block}", num_in if block == 0 else width, width)
        if level != last:
            conv(f"encoder.down.{level}.downsample.conv", width, width)
    middle("encoder.mid", widths[-1])
    norm("encoder.norm_out", widths[-1])
    conv("encoder.conv_out", widths[-1], 2 * params.z_channels)

    conv("decoder.conv_in", params.z_channels, widths[-1])
    middle("decoder.mid", widths[-1])
    for level, width in enumerate(widths):
        num_in = widths[min(level + 1, last)]
        for block in range(params.num_res_blocks + 1):
            resnet(f"decoder.up.{level}.block.{block}", num_in if block == 0 else width, width)
        if level != 0:
            conv(f"decoder.up.{level}.upsample.conv", width, width)
    norm("decoder.norm_out", widths[0])
    conv("decoder.conv_out", widths[0], params.out_ch)
    return shapes


def clip_shapes(params: ClipParams) -> dict[str, Shape]:
    """The parameters of a CLIP text encoder, without the prefix `text_model.`."""
    dim, wide = params.hidden_size, params.intermediate_size
    shapes: dict[str, Shape] = {
        "embeddings.token_embedding.weight": (params.vocab_size, dim),
        "embeddings.position_embedding.weight": (params.max_position_embeddings, dim),
    }
    for index in range(params.num_hidden_layers):
        layer = f"encoder.layers.{index}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _with_bias(f"{layer}.self_attn.{name}", (dim, dim))
        shapes |= _with_bias(f"{layer}.layer_norm1", (dim,))
        shapes |= _with_bias(f"{layer}.mlp.fc1", (wide, dim))
        shapes |= _with_bias(f"{layer}.mlp.fc2", (dim, wide))
        shapes |= _with_bias(f"{layer}.layer_norm2", (dim,))
    return shapes | dict(_with_bias("final_layer_norm", (dim,)))


def _with_bias(name: str, shape: Shape) -> dict[str, Shape]:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def t5_shapes(params: T5Params) -> dict[str, Shape]:
    """The parameters of a T5 v1.1 encoder."""
    return dict(_t5_entries(params))


def _t5_entries(params: T5Params) -> Iterator[tuple[str, Shape]]:
    dim, inner = params.d_model, params.num_heads * params.d_kv
    yield "shared.weight", (params.vocab_size, dim)
    for index in range(params.num_layers):
        attention = f"encoder.block.{index}.layer.0"
        for name in ("q", "k", "v"):
            yield f"{attention}.SelfAttention.{name}.weight", (inner, dim)
        yield f"{attention}.SelfAttention.o.weight", (dim, inner)
        if index == 0:
            yield f"{attention}.SelfAttention.relative_attention_bias.weight", (params.num_buckets, params.num_heads)
        yield f"{attention}.layer_norm.weight", (dim,)
        feed_forward = f"encoder.block.{index}.layer.1"
        for name in ("wi_0", "wi_1"):
            yield f"{feed_forward}.DenseReluDense.{name}.weight", (params.d_ff, dim)
        yield f"{feed_forward}.DenseReluDense.wo.weight", (dim, params.d_ff)
        yield f"{feed_forward}.layer_norm.weight", (dim,)
    yield "encoder.final_layer_norm.weight", (dim,)
