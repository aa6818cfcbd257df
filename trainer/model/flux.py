"""The FLUX.1 transformer, dev and schnell. Structure and state-dict names are those of the published single-file models.

B batch, N image tokens, L text tokens, C hidden size, D head dim. `img` (B, N, in_channels) are packed latents,
`txt` (B, L, context_in_dim) the T5 sequence, `y` (B, vec_in_dim) the pooled CLIP vector.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from trainer.model.attention import QKNorm, SelfAttention
from trainer.model.frozen_linear import FrozenLinear
from trainer.model.half import saturated, to_compute
from trainer.model.joint import Conditioning, JointTransformer
from trainer.model.layers import (
    MLPEmbedder,
    Modulation,
    double_stream,
    feed_forward,
    modulated_norm,
    single_stream,
    timestep_embedding,
)
from trainer.schema.checkpoint_header import FluxParams

TIME_EMBEDDING_DIM = 256


class DoubleStreamBlock(nn.Module):
    """Image and text with weights of their own and one attention over both; text comes first in the joint sequence."""

    def __init__(self, params: FluxParams) -> None:
        super().__init__()
        dim, mlp_dim = params.hidden_size, round(params.hidden_size * params.mlp_ratio)
        self.num_heads = params.num_heads
        self.img_mod = Modulation(dim, double=True)
        self.img_attn = SelfAttention(dim, params.num_heads, params.qkv_bias)
        self.img_mlp = feed_forward(dim, mlp_dim)
        self.txt_mod = Modulation(dim, double=True)
        self.txt_attn = SelfAttention(dim, params.num_heads, params.qkv_bias)
        self.txt_mlp = feed_forward(dim, mlp_dim)

    def modulations(self, vec: Tensor) -> tuple[Tensor, ...]:
        """vec (B, C) -> twelve vectors (B, C), the image's first."""
        return (*self.img_mod(vec), *self.txt_mod(vec))

    def forward(
        self, img: Tensor, txt: Tensor, given: Conditioning, pe: Tensor, key_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """img (B, N, C), txt (B, L, C), pe (., L + N, D/2) -> the new img and txt.

        `given` is the conditioning vector (B, C), or what `modulations` makes of it.
        """
        vectors = self.modulations(given) if isinstance(given, Tensor) else given
        return double_stream(self, img, txt, vectors[:6], vectors[6:], pe, key_mask)


class SingleStreamBlock(nn.Module):
    """Attention and MLP side by side on the joint sequence, between one Linear in and one out."""

    def __init__(self, params: FluxParams) -> None:
        super().__init__()
        dim, mlp_dim = params.hidden_size, round(params.hidden_size * params.mlp_ratio)
        self.num_heads = params.num_heads
        self.linear1 = FrozenLinear(dim, 3 * dim + mlp_dim)
        self.linear2 = FrozenLinear(dim + mlp_dim, dim)
        self.norm = QKNorm(dim // params.num_heads)
        self.modulation = Modulation(dim, double=False)

    def modulations(self, vec: Tensor) -> tuple[Tensor, ...]:
        """vec (B, C) -> three vectors (B, C)."""
        return self.modulation(vec)

    def forward(self, x: Tensor, given: Conditioning, pe: Tensor, key_mask: Tensor | None) -> Tensor:
        """x (B, L + N, C), pe (., L + N, D/2) -> the new x. `given` as in a double block."""
        vectors = self.modulations(given) if isinstance(given, Tensor) else given
        return single_stream(self, x, vectors, pe, key_mask)


class LastLayer(nn.Module):
    """Modulated norm and projection to the velocity of the packed latents."""

    def __init__(self, dim: int, out_channels: int) -> None:
        super().__init__()
        self.linear = FrozenLinear(dim, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), FrozenLinear(dim, 2 * dim))

    def forward(self, img: Tensor, vec: Tensor) -> Tensor:
        """img (B, N, C), vec (B, C) -> (B, N, out_channels)."""
        shift, scale = saturated(self.adaLN_modulation(vec)).chunk(2, dim=-1)
        return saturated(self.linear(modulated_norm(img, shift, scale)))


class Flux(JointTransformer):
    """The whole transformer."""

    def __init__(self, params: FluxParams) -> None:
        super().__init__(params)
        self.params = params
        self.modulates_outside = False
        """Whether the modulation is computed before each block, for weights that are not where the block's are."""
        dim = params.hidden_size
        self.img_in = FrozenLinear(params.in_channels, dim)
        self.time_in = MLPEmbedder(TIME_EMBEDDING_DIM, dim)
        self.vector_in = MLPEmbedder(params.vec_in_dim, dim)
        self.guidance_in = MLPEmbedder(TIME_EMBEDDING_DIM, dim) if params.guidance_embed else None
        self.txt_in = FrozenLinear(params.context_in_dim, dim)
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(params) for _ in range(params.depth))
        self.single_blocks = nn.ModuleList(SingleStreamBlock(params) for _ in range(params.depth_single_blocks))
        self.final_layer = LastLayer(dim, params.out_channels)

    def forward(
        self,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        timesteps: Tensor,
        y: Tensor,
        guidance: Tensor | None = None,
        txt_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """The velocity (B, N, out_channels) at `timesteps` (B) in [0, 1].

        `img_ids` (1 or B, N, 3) and `txt_ids` (1 or B, L, 3) are positions; `guidance` (B) is needed by dev and ignored by
        schnell. `txt_attention_mask` (B, L) is non-zero for real tokens and hides the others as keys; None hides
        nothing and is the fast way. Inputs are cast to the type of the weights.
        """
        if self.guidance_in is not None and guidance is None:
            raise ValueError("this model has a guidance embedding; guidance is needed")
        dtype = self.input_dtype()
        vec = self.time_in(timestep_embedding(timesteps, TIME_EMBEDDING_DIM).to(dtype))
        if self.guidance_in is not None and guidance is not None:
            vec = vec + self.guidance_in(timestep_embedding(guidance, TIME_EMBEDDING_DIM).to(dtype))
        vec = saturated(vec + self.vector_in(to_compute(y, dtype)))
        doubles, singles = self._conditionings(self.double_blocks, vec), self._conditionings(self.single_blocks, vec)
        return self.final_layer(self.run_blocks(img, img_ids, txt, txt_ids, txt_attention_mask, doubles, singles), vec)

    def _conditionings(self, blocks: nn.ModuleList, vec: Tensor) -> Iterator[Conditioning]:
        """For each block in turn the vector, or the modulations that are computed here, outside of the block: once a
        forward pass, whatever is run again in backward."""
        for block in blocks:
            if not self.modulates_outside:
                yield vec
            elif isinstance(block, (DoubleStreamBlock, SingleStreamBlock)):
                yield block.modulations(vec)
