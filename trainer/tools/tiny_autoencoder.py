"""A small autoencoder of the FLUX.1 kind that works without training: the weights are arranged, not learned.

Its latents are colour and detail features of 8x8 pixel blocks with a spread near 1; decoding them gives the picture
back, smoothed over 8 pixels. How a network of GroupNorm, SiLU and 3x3 convolutions becomes such a block transform:

- residual blocks and the middle attention end in convolutions of small gain, so they pass their input on;
- SiLU(x) - SiLU(-x) = x, so a signal carried as the pair (x, -x) survives the activation;
- GroupNorm over (x, -x, K, -K) with a large constant K divides by almost exactly K / sqrt(2) whatever x is. Where a
  group has only two channels there is no room for K and the signal is normalised to a mean square of 1.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from trainer.tools.tiny_weights import StorageType, Weights, norm, normal, write_safetensors, zeros

# Latent statistics of the published FLUX.1 autoencoder: latents = scale * (moments - shift).
_AE_SCALE = 0.3611
_AE_SHIFT = 0.1159

_GROUPS = 32
_REFERENCE_LEVEL = 8.0
_BRANCH_GAIN = 0.005

# A feature of an 8x8 block: a colour axis, then one 2x2 pattern for each of the three halvings.
Step: TypeAlias = Literal["mean", "dx", "dy", "dxy"]
Feature: TypeAlias = tuple[str, tuple[Step, ...]]

COLOUR_AXES: Mapping[str, tuple[float, float, float]] = {
    "luma": (1 / 3, 1 / 3, 1 / 3),
    "red_blue": (0.5, 0.0, -0.5),
    "green": (-0.25, 0.5, -0.25),
}
STEPS: Mapping[Step, tuple[tuple[float, float], tuple[float, float]]] = {
    "mean": ((0.25, 0.25), (0.25, 0.25)),
    "dx": ((0.5, -0.5), (0.5, -0.5)),
    "dy": ((0.5, 0.5), (-0.5, -0.5)),
    "dxy": ((0.5, -0.5), (-0.5, 0.5)),
}
LATENT_FEATURES: tuple[Feature, ...] = (
    ("luma", ("mean", "mean", "mean")),
    ("red_blue", ("mean", "mean", "mean")),
    ("green", ("mean", "mean", "mean")),
    ("luma", ("mean", "mean", "dx")),
    ("luma", ("mean", "mean", "dy")),
    ("luma", ("mean", "mean", "dxy")),
    ("red_blue", ("mean", "mean", "dx")),
    ("red_blue", ("mean", "mean", "dy")),
    ("green", ("mean", "mean", "dx")),
    ("green", ("mean", "mean", "dy")),
    ("luma", ("mean", "dx", "mean")),
    ("luma", ("mean", "dy", "mean")),
    ("luma", ("mean", "dxy", "mean")),
    ("luma", ("dx", "mean", "mean")),
    ("luma", ("dy", "mean", "mean")),
    ("luma", ("dxy", "mean", "mean")),
)
# Latents of ordinary pictures then have a spread near 1, as the published ones do; detail is rarer than colour.
_COLOUR_GAINS: Mapping[str, float] = {"luma": 2.0, "red_blue": 2.5, "green": 2.5}
_DETAIL_GAIN = 4.0
_LOG_VARIANCE = -8.0


def make_autoencoder(
    path: Path,
    *,
    ch: int = 32,
    ch_mult: Sequence[int] = (1, 1, 2, 2),
    num_res_blocks: int = 1,
    dtype: StorageType = "bf16",
    seed: int = 2,
) -> Path:
    """Write an autoencoder of the FLUX.1 kind: 3 channels, 8 times smaller, 16 latent channels. Returns `path`.

    `ch` is a multiple of 32, because the normalisation uses 32 groups, and `ch_mult` has four levels.
    """
    if ch % _GROUPS or len(ch_mult) != 4 or num_res_blocks < 1:
        raise ValueError("ch must be a multiple of 32, ch_mult must have 4 levels, num_res_blocks must be 1 or more")
    if any(not low <= high <= 2 * low for low, high in itertools.pairwise(ch_mult)):
        raise ValueError(f"ch_mult {tuple(ch_mult)} must stay equal or grow at most twofold from level to level")
    rng = np.random.default_rng(seed)
    w: Weights = {}
    _encoder(w, rng, ch, tuple(ch_mult), num_res_blocks)
    _decoder(w, rng, ch, tuple(ch_mult), num_res_blocks)
    config = {
        "resolution": 256,
        "in_channels": 3,
        "ch": ch,
        "out_ch": 3,
        "ch_mult": list(ch_mult),
        "num_res_blocks": num_res_blocks,
        "z_channels": len(LATENT_FEATURES),
        "scale_factor": _AE_SCALE,
        "shift_factor": _AE_SHIFT,
    }
    write_safetensors(path, w, dtype=dtype, config=config)
    return path


def _encoder(w: Weights, rng: np.random.Generator, ch: int, ch_mult: tuple[int, ...], num_res_blocks: int) -> None:
    features = [_prefixes(num_steps) for num_steps in range(4)]
    slots = _slots(ch * ch_mult[-1], len(LATENT_FEATURES))

    _conv(w, "encoder.conv_in", 3, ch)
    for row, (axis, _) in enumerate(features[0]):
        w["encoder.conv_in.weight"][row, :, 1, 1] = COLOUR_AXES[axis]

    channels = ch
    for level, multiplier in enumerate(ch_mult):
        for block in range(num_res_blocks):
            _residual(w, rng, f"encoder.down.{level}.block.{block}", channels, ch * multiplier)
            channels = ch * multiplier
        if level == len(ch_mult) - 1:
            break
        name = f"encoder.down.{level}.downsample.conv"
        _conv(w, name, channels, channels)
        last = level == len(ch_mult) - 2
        for row, (axis, steps) in enumerate(features[level + 1]):
            # The convolution sees one row and column beyond the 2x2 block; it gets weight zero.
            source = features[level].index((axis, steps[:-1]))
            kernel = np.array(STEPS[steps[-1]], dtype=np.float32)
            for channel, sign in _carriers(slots[row]) if last else ((row, 1.0),):
                w[f"{name}.weight"][channel, source, :2, :2] = sign * kernel
        if last:
            _set_references(w[f"{name}.bias"], slots)

    _middle(w, rng, "encoder", channels)
    _signal_norm(w, "encoder.norm_out", channels, slots)
    _conv(w, "encoder.conv_out", channels, 2 * len(LATENT_FEATURES))
    for row, feature in enumerate(LATENT_FEATURES):
        gain = latent_gain(feature) if _has_references(slots) else 1.0
        for channel, sign in _carriers(slots[row]):
            w["encoder.conv_out.weight"][row, channel, 1, 1] = sign * gain / _AE_SCALE
    w["encoder.conv_out.bias"][: len(LATENT_FEATURES)] = _AE_SHIFT
    w["encoder.conv_out.bias"][len(LATENT_FEATURES) :] = _LOG_VARIANCE


def _decoder(w: Weights, rng: np.random.Generator, ch: int, ch_mult: tuple[int, ...], num_res_blocks: int) -> None:
    slots = _slots(ch * ch_mult[0], 3)
    axes = ("luma", "red_blue", "green")
    to_rgb = np.linalg.inv(np.array([COLOUR_AXES[axis] for axis in axes]))

    channels = ch * ch_mult[-1]
    _conv(w, "decoder.conv_in", len(LATENT_FEATURES), channels)
    for row, axis in enumerate(axes):
        source = LATENT_FEATURES.index((axis, ("mean", "mean", "mean")))
        w["decoder.conv_in.weight"][row, source, 1, 1] = _AE_SCALE / _COLOUR_GAINS[axis]
        w["decoder.conv_in.bias"][row] = -_AE_SHIFT * _AE_SCALE / _COLOUR_GAINS[axis]
    _middle(w, rng, "decoder", channels)

    for level in reversed(range(len(ch_mult))):
        for block in range(num_res_blocks + 1):
            _residual(w, rng, f"decoder.up.{level}.block.{block}", channels, ch * ch_mult[level])
            channels = ch * ch_mult[level]
        if level == 0:
            break
        # Repeating each pixel and then averaging (1, 2, 1) / 4 both ways interpolates between them.
        name = f"decoder.up.{level}.upsample.conv"
        _conv(w, name, channels, channels)
        blur = np.outer((0.25, 0.5, 0.25), (0.25, 0.5, 0.25)).astype(np.float32)
        for row in range(len(axes)):
            # The last upsampling makes RGB, as pairs, for the activation before the final convolution. Channels of
            # level 0 keep their order whether or not its first block changes their number.
            if level > 1:
                w[f"{name}.weight"][row, row] = blur
                continue
            for channel, sign in _carriers(slots[row]):
                w[f"{name}.weight"][channel, : len(axes)] = sign * to_rgb[row][:, None, None] * blur
        if level == 1:
            _set_references(w[f"{name}.bias"], slots)

    _signal_norm(w, "decoder.norm_out", channels, slots)
    _conv(w, "decoder.conv_out", channels, 3)
    # Normalised signals come out with mean square 1, where colours in [-1, 1] have about 0.6.
    level_gain = 1.0 if _has_references(slots) else 0.75
    for row in range(3):
        for channel, sign in _carriers(slots[row]):
            w["decoder.conv_out.weight"][row, channel, 1, 1] = sign * level_gain


def latent_gain(feature: Feature) -> float:
    axis, steps = feature
    return _COLOUR_GAINS[axis] * (_DETAIL_GAIN if any(step != "mean" for step in steps) else 1.0)


def _prefixes(num_steps: int) -> list[Feature]:
    """The features after `num_steps` halvings that the latents need, each once."""
    return list(dict.fromkeys((axis, steps[:num_steps]) for axis, steps in LATENT_FEATURES))


@dataclass(frozen=True)
class _Slot:
    """Where a signal lives before a GroupNorm: channels for x, -x, and constants K, -K when the group has room."""

    plus: int
    minus: int
    references: tuple[int, int] | None
    group_size: int


def _slots(channels: int, count: int) -> list[_Slot]:
    size = channels // _GROUPS
    if size == 1:
        return [_Slot(2 * index, 2 * index + 1, None, size) for index in range(count)]
    starts = [size * index for index in range(count)]
    return [_Slot(at, at + 1, (at + 2, at + 3) if size >= 4 else None, size) for at in starts]


def _carriers(slot: _Slot) -> tuple[tuple[int, float], tuple[int, float]]:
    return ((slot.plus, 1.0), (slot.minus, -1.0))


def _has_references(slots: Sequence[_Slot]) -> bool:
    return slots[0].references is not None


def _set_references(bias: NDArray[np.float32], slots: Sequence[_Slot]) -> None:
    for slot in slots:
        if slot.references is not None:
            bias[slot.references[0]] = _REFERENCE_LEVEL
            bias[slot.references[1]] = -_REFERENCE_LEVEL


def _signal_norm(w: Weights, name: str, channels: int, slots: Sequence[_Slot]) -> None:
    norm(w, name, channels)
    for slot in slots:
        if slot.references is not None:
            restore = _REFERENCE_LEVEL * math.sqrt(2 / slot.group_size)
            w[f"{name}.weight"][[slot.plus, slot.minus]] = restore


def _conv(w: Weights, name: str, num_in: int, num_out: int, size: int = 3) -> None:
    w[f"{name}.weight"] = zeros(num_out, num_in, size, size)
    w[f"{name}.bias"] = zeros(num_out)


def _random_conv(
    w: Weights, rng: np.random.Generator, name: str, num_in: int, num_out: int, *, gain: float, size: int = 3
) -> None:
    w[f"{name}.weight"] = normal(rng, num_out, num_in, size, size, std=gain / math.sqrt(num_in * size * size))
    w[f"{name}.bias"] = zeros(num_out)


def _residual(w: Weights, rng: np.random.Generator, name: str, num_in: int, num_out: int) -> None:
    norm(w, f"{name}.norm1", num_in)
    _random_conv(w, rng, f"{name}.conv1", num_in, num_out, gain=1.0)
    norm(w, f"{name}.norm2", num_out)
    _random_conv(w, rng, f"{name}.conv2", num_out, num_out, gain=_BRANCH_GAIN)
    if num_in != num_out:
        _conv(w, f"{name}.nin_shortcut", num_in, num_out, size=1)
        shared = range(min(num_in, num_out))
        w[f"{name}.nin_shortcut.weight"][shared, shared, 0, 0] = 1.0


def _middle(w: Weights, rng: np.random.Generator, side: str, channels: int) -> None:
    _residual(w, rng, f"{side}.mid.block_1", channels, channels)
    norm(w, f"{side}.mid.attn_1.norm", channels)
    for name in ("q", "k", "v"):
        _random_conv(w, rng, f"{side}.mid.attn_1.{name}", channels, channels, gain=1.0, size=1)
    _random_conv(w, rng, f"{side}.mid.attn_1.proj_out", channels, channels, gain=_BRANCH_GAIN, size=1)
    _residual(w, rng, f"{side}.mid.block_2", channels, channels)
