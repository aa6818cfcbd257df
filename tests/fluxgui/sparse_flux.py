"""A FLUX.1 dev file of the published size that takes no room on the disk: a real header over a hole."""

from __future__ import annotations

import json
import struct
from pathlib import Path

HIDDEN, HEAD, MLP, TIME, TEXT, POOLED, CHANNELS = 3072, 128, 12288, 256, 4096, 768, 64


def shapes() -> dict[str, tuple[int, ...]]:
    """The published names and shapes, biases included."""
    linears: dict[str, tuple[int, int]] = {
        "img_in": (HIDDEN, CHANNELS),
        "txt_in": (HIDDEN, TEXT),
        "final_layer.linear": (CHANNELS, HIDDEN),
        "final_layer.adaLN_modulation.1": (2 * HIDDEN, HIDDEN),
    }
    for name, width in (("time_in", TIME), ("guidance_in", TIME), ("vector_in", POOLED)):
        linears |= {f"{name}.in_layer": (HIDDEN, width), f"{name}.out_layer": (HIDDEN, HIDDEN)}
    scales: dict[str, tuple[int, ...]] = {}
    for index in range(19):
        for stream in ("img", "txt"):
            block = f"double_blocks.{index}.{stream}"
            linears |= {
                f"{block}_mod.lin": (6 * HIDDEN, HIDDEN),
                f"{block}_attn.qkv": (3 * HIDDEN, HIDDEN),
                f"{block}_attn.proj": (HIDDEN, HIDDEN),
                f"{block}_mlp.0": (MLP, HIDDEN),
                f"{block}_mlp.2": (HIDDEN, MLP),
            }
            scales |= {f"{block}_attn.norm.{kind}_norm.scale": (HEAD,) for kind in ("query", "key")}
    for index in range(38):
        block = f"single_blocks.{index}"
        linears |= {
            f"{block}.linear1": (3 * HIDDEN + MLP, HIDDEN),
            f"{block}.linear2": (HIDDEN, HIDDEN + MLP),
            f"{block}.modulation.lin": (3 * HIDDEN, HIDDEN),
        }
        scales |= {f"{block}.norm.{kind}_norm.scale": (HEAD,) for kind in ("query", "key")}
    weights = {f"{name}.weight": shape for name, shape in linears.items()}
    biases = {f"{name}.bias": shape[:1] for name, shape in linears.items()}
    return {**weights, **biases, **scales}


def make_sparse_flux(path: Path) -> Path:
    """Write the header and make the file as long as it says, without writing the 23.8 GB behind it."""
    entries: dict[str, object] = {}
    offset = 0
    for name, shape in shapes().items():
        size = 2
        for side in shape:
            size *= side
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    header = json.dumps(entries).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + offset)
    return path
