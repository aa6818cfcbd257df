"""What the models' activations take, counted in tensors: what the blocks of `trainer.model` keep for backward, and have
at most at one moment.

C hidden size, M hidden size of the MLP, m = M / C.
"""

from __future__ import annotations

from trainer.schema.checkpoint_header import T5Params
from trainer.schema.chroma_header import TransformerParams
from trainer.schema.network_args import DoraAxis
from trainer.schema.parameter_counts import mlp_size


def saved_values_per_token(flux: TransformerParams) -> tuple[float, float]:
    """What autograd keeps of a double and of a single block beside its input, in tensors of C values per token.

    Double, each stream: two normed inputs, qkv (3), query, key and value (3), attention, projection, sum, MLP output, and
    the MLP's inside before and after GELU (2 m). Single: the normed input, linear1 (3 + m), query and key (2), attention,
    linear2's input (1 + m) and output. All Linears are taken to have a LoRA, which keeps their inputs.
    """
    m = mlp_size(flux) / flux.hidden_size
    return 12 + 2 * m, 9 + 2 * m


def small_saved_bytes(flux: TransformerParams, num_tokens: int, batch: int, value_bytes: int) -> tuple[int, int]:
    """What autograd keeps beside these tensors of C values per token, of a double and of a single block, in bytes.

    Per token: mean and deviation of each layer norm (a double block has two, a single one), the roots of query and key
    and attention's log-sum-exp for each head, all in fp32. Per sample: the modulation's output (6 C a stream, 3 C), each
    1 + scale (2 C a stream, C) and the modulation LoRA's input (C a stream, C).
    """
    c, heads = flux.hidden_size, 3 * 4 * flux.num_heads
    double = num_tokens * (2 * 2 * 4 + heads) + 18 * batch * c * value_bytes
    single = num_tokens * (2 * 4 + heads) + 5 * batch * c * value_bytes
    return double, single


def last_saved_bytes(flux: TransformerParams, num_image: int, batch: int, value_bytes: int) -> int:
    """What the last layer keeps beside the last block's output: its norm's statistics, shift, scale and 1 + scale, and the
    conditioning vector that all blocks have in common. `num_image` counts the tokens of all samples."""
    return num_image * 2 * 4 + 4 * batch * flux.hidden_size * value_bytes


def work_per_token(flux: TransformerParams) -> float:
    """What one block has at most during backward, its saved tensors included, in tensors of C values per token.

    Double: the gradients around GELU join the saved tensors. Single: those of linear2's output and input, the latter twice,
    once from the weight and once from the LoRA.
    """
    m = mlp_size(flux) / flux.hidden_size
    double, single = saved_values_per_token(flux)
    return max(double + 2 + 2 * m, single + 2 + 2 * (1 + m))


def fp16_values_per_token(flux: TransformerParams) -> tuple[float, float]:
    """What fp16 keeps besides, of a double and of a single block, to stay in its range: what the norms and the sums make
    in fp32, and the inputs of the last Linears as they are scaled. The numbers are counted ones: of real passes."""
    m = mlp_size(flux) / flux.hidden_size
    return 11 + m, 6 + m


def forward_per_token(flux: TransformerParams) -> float:
    """What a forward pass without gradients has at most, in tensors of C values per token."""
    m = mlp_size(flux) / flux.hidden_size
    return max(10 + 2 * m, 8 + 3 * m)


def dora_values_per_token(flux: TransformerParams, axis: DoraAxis) -> tuple[float, float]:
    """What DoRA keeps besides, of a double and of a single block: each Linear's scaled input, or its unscaled output."""
    m = mlp_size(flux) / flux.hidden_size
    return (3 + m, 2 + m) if axis == "in" else (5 + m, 4 + m)


def dora_work_per_token(flux: TransformerParams, axis: DoraAxis) -> float:
    """The widest tensor that DoRA scales, in tensors of C values per token. It is scaled in fp32."""
    m = mlp_size(flux) / flux.hidden_size
    return 1 + m if axis == "in" else 3 + m


def t5_values_per_token(t5: T5Params, length: int) -> int:
    """What a layer of T5 that trains keeps for backward beside its input: two normed inputs and two sums, query, key,
    value and attention, the scores of all heads and the gated MLP's four."""
    return 4 * t5.d_model + 4 * t5.num_heads * t5.d_kv + 2 * t5.num_heads * length + 4 * t5.d_ff
