"""The Chroma transformer: FLUX.1 schnell's blocks, all modulated by one small network, the approximator.

Structure and state-dict names are those of the published Chroma1 files (lodestones, "Chroma", 2025). There is no pooled
CLIP vector. Text padding is masked except for one token, with which the model was trained.

B batch, N image tokens, L text tokens, C hidden size, D head dim, S modulation vectors. `img` (B, N, in_channels) are
packed latents, `txt` (B, L, context_in_dim) the T5 sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.model.attention import QKNorm, RMSNorm, SelfAttention
from trainer.model.frozen_linear import FrozenLinear
from trainer.model.half import saturated
from trainer.model.joint import JointTransformer
from trainer.model.layers import (
    MLPEmbedder,
    double_stream,
    feed_forward,
    modulated_norm,
    single_stream,
    timestep_embedding,
)
from trainer.schema.chroma_header import DOUBLE_VECTORS, LAST_VECTORS, SINGLE_VECTORS, ChromaParams

STREAM_VECTORS = DOUBLE_VECTORS // 2


class Approximator(nn.Module):
    """A residual MLP that gives every modulation vector of the model, each from an embedding of its index."""

    def __init__(self, params: ChromaParams) -> None:
        super().__init__()
        dim = params.approximator_hidden_size
        self.in_proj = FrozenLinear(params.approximator_in_dim, dim)
        self.layers = nn.ModuleList(MLPEmbedder(dim, dim) for _ in range(params.approximator_depth))
        self.norms = nn.ModuleList(RMSNorm(dim) for _ in range(params.approximator_depth))
        self.out_proj = FrozenLinear(dim, params.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, approximator_in_dim) -> (B, S, C)."""
        x = self.in_proj(x)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + layer(norm(x))
        return self.out_proj(x)


class ChromaDoubleBlock(nn.Module):
    """A double block of FLUX.1 whose modulation comes from outside."""

    def __init__(self, params: ChromaParams) -> None:
        super().__init__()
        dim, mlp_dim = params.hidden_size, round(params.hidden_size * params.mlp_ratio)
        self.num_heads = params.num_heads
        self.img_attn = SelfAttention(dim, params.num_heads, params.qkv_bias)
        self.img_mlp = feed_forward(dim, mlp_dim)
        self.txt_attn = SelfAttention(dim, params.num_heads, params.qkv_bias)
        self.txt_mlp = feed_forward(dim, mlp_dim)

    def forward(
        self, img: Tensor, txt: Tensor, modulation: Tensor, pe: Tensor, key_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """img (B, N, C), txt (B, L, C), modulation (B, 12, C) with the image's half first -> the new img and txt."""
        vectors = modulation.unbind(1)
        return double_stream(self, img, txt, vectors[:STREAM_VECTORS], vectors[STREAM_VECTORS:], pe, key_mask)


class ChromaSingleBlock(nn.Module):
    """A single block of FLUX.1 whose modulation comes from outside."""

    def __init__(self, params: ChromaParams) -> None:
        super().__init__()
        dim, mlp_dim = params.hidden_size, round(params.hidden_size * params.mlp_ratio)
        self.num_heads = params.num_heads
        self.linear1 = FrozenLinear(dim, 3 * dim + mlp_dim)
        self.linear2 = FrozenLinear(dim + mlp_dim, dim)
        self.norm = QKNorm(dim // params.num_heads)

    def forward(self, x: Tensor, modulation: Tensor, pe: Tensor, key_mask: Tensor | None) -> Tensor:
        """x (B, L + N, C), modulation (B, 3, C) -> the new x."""
        return single_stream(self, x, modulation.unbind(1), pe, key_mask)


class ChromaLastLayer(nn.Module):
    """Modulated norm and projection to the velocity of the packed latents."""

    def __init__(self, dim: int, out_channels: int) -> None:
        super().__init__()
        self.linear = FrozenLinear(dim, out_channels)

    def forward(self, img: Tensor, modulation: Tensor) -> Tensor:
        """img (B, N, C), modulation (B, 2, C) -> (B, N, out_channels)."""
        shift, scale = modulation.unbind(1)
        return saturated(self.linear(modulated_norm(img, shift, scale)))


class Chroma(JointTransformer):
    """The whole transformer. LoRA, block swap and checkpointing treat it as they do `Flux`."""

    def __init__(self, params: ChromaParams) -> None:
        super().__init__(params)
        self.params = params
        dim = params.hidden_size
        self.img_in = FrozenLinear(params.in_channels, dim)
        self.distilled_guidance_layer = Approximator(params)
        self.txt_in = FrozenLinear(params.context_in_dim, dim)
        self.double_blocks = nn.ModuleList(ChromaDoubleBlock(params) for _ in range(params.depth))
        self.single_blocks = nn.ModuleList(ChromaSingleBlock(params) for _ in range(params.depth_single_blocks))
        self.final_layer = ChromaLastLayer(dim, params.out_channels)

    def forward(
        self,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        timesteps: Tensor,
        guidance: Tensor,
        txt_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """The velocity (B, N, out_channels) at `timesteps` (B) in [0, 1].

        `img_ids` (1 or B, N, 3) and `txt_ids` (1 or B, L, 3) are positions; `guidance` (B) is 0 in all published use.
        `txt_attention_mask` (B, L) is non-zero for tokens that are visible as keys: the real ones and one padding token.
        None hides nothing. Inputs are cast to the type of the weights.
        """
        single, img_part, txt_part, last = self._split(self.modulation_vectors(timesteps, guidance))
        doubles = [
            torch.cat((img_part[:, first : first + STREAM_VECTORS], txt_part[:, first : first + STREAM_VECTORS]), dim=1)
            for first in range(0, img_part.shape[1], STREAM_VECTORS)
        ]
        singles = [single[:, first : first + SINGLE_VECTORS] for first in range(0, single.shape[1], SINGLE_VECTORS)]
        return self.final_layer(self.run_blocks(img, img_ids, txt, txt_ids, txt_attention_mask, doubles, singles), last)

    def modulation_vectors(self, timesteps: Tensor, guidance: Tensor) -> Tensor:
        """(B, S, C): the vectors of all single blocks, of the double blocks' images, of their texts, of the last layer."""
        dim, num_vectors = self.params.approximator_in_dim, self.params.num_modulation_vectors
        batch = timesteps.shape[0]
        moment = torch.cat((timestep_embedding(timesteps, dim // 4), timestep_embedding(guidance, dim // 4)), dim=-1)
        index = timestep_embedding(torch.arange(num_vectors, device=timesteps.device), dim // 2)
        given = torch.cat((moment[:, None].expand(-1, num_vectors, -1), index[None].expand(batch, -1, -1)), dim=-1)
        return saturated(self.distilled_guidance_layer(given.to(self.input_dtype())))

    def _split(self, vectors: Tensor) -> tuple[Tensor, ...]:
        stream = STREAM_VECTORS * self.params.depth
        return vectors.split([SINGLE_VECTORS * self.params.depth_single_blocks, stream, stream, LAST_VECTORS], dim=1)
