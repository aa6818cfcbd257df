"""sd-scripts' own model, LoRA and block swap, timed in a process of its own in its own environment.

Only its public names are called; nothing of it is part of this project. A checkout and an environment that has its
requirements are given by path.
"""

from __future__ import annotations

import json
import statistics
import subprocess
from pathlib import Path

from trainer.schema.checkpoint_header import FluxParams

SWAPS = (0, 18, 35)
FIELDS = (
    "in_channels",
    "vec_in_dim",
    "context_in_dim",
    "hidden_size",
    "mlp_ratio",
    "num_heads",
    "depth",
    "depth_single_blocks",
    "theta",
    "qkv_bias",
    "guidance_embed",
)

_CHILD = """
import json, os, sys, time
import torch
sys.path.insert(0, os.getcwd())
from library import flux_models
from networks import lora_flux

given = json.loads(sys.argv[1])
kind, side, num_text, swap = given["device"], given["side"], given["num_text"], given["swap"]
device, dtype = torch.device(kind), torch.bfloat16 if kind == "cuda" else torch.float32
with torch.device("meta"):
    model = flux_models.Flux(flux_models.FluxParams(**given["params"])).requires_grad_(False)
model = model.to(dtype).to_empty(device="cpu" if swap else device)
for parameter in model.parameters():
    parameter.data.copy_(torch.randn(parameter.shape, device=device, dtype=dtype).mul_(0.02))
if swap:
    model.enable_block_swap(swap, device)
network = lora_flux.create_network(1.0, 16, 16.0, None, [], model)
network.apply_to([], model, apply_text_encoder=False, apply_unet=True)
network.to(device).train()
model.enable_gradient_checkpointing()
if swap:
    model.move_to_device_except_swap_blocks(device)
    model.prepare_block_swap_before_forward()
model.train()
network.prepare_grad_etc([], model)
parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
optimizer = torch.optim.AdamW(parameters, lr=1e-5)
rows = side // 16
img = torch.randn(1, rows * rows, given["params"]["in_channels"], device=device, dtype=dtype)
txt = torch.randn(1, num_text, given["params"]["context_in_dim"], device=device, dtype=dtype)
y = torch.randn(1, given["params"]["vec_in_dim"], device=device, dtype=dtype)
img_ids = torch.zeros(1, rows * rows, 3, device=device)
img_ids[0, :, 1] = torch.arange(rows, device=device).repeat_interleave(rows)
img_ids[0, :, 2] = torch.arange(rows, device=device).repeat(rows)
txt_ids = torch.zeros(1, num_text, 3, device=device)
target = torch.randn(1, rows * rows, given["params"]["in_channels"], device=device)
seconds = []
for number in range(6):
    if kind == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
        output = model(img=img, img_ids=img_ids, txt=txt, txt_ids=txt_ids, timesteps=torch.tensor([0.6], device=device),
                       y=y, guidance=torch.ones(1, device=device))
    (output.float() - target).square().mean().backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if kind == "cuda":
        torch.cuda.synchronize()
    seconds.append(time.perf_counter() - started)
peak = torch.cuda.max_memory_allocated() if kind == "cuda" else 0
print(json.dumps([seconds[2:], peak]))
"""


def measure_sd_scripts(
    checkout: Path, python: Path, params: FluxParams, side: int, left: float, kind: str = "cuda", num_text: int = 512
) -> list[str]:
    """A line of Markdown for each swap count, or why there is none."""
    lines = [
        "| sd-scripts, bf16 | px | swap | step s: min / median / max | peak GB, allocated |",
        "|---|---|---|---|---|",
    ]
    sizes = {name: getattr(params, name) for name in FIELDS} | {"axes_dim": list(params.axes_dim)}
    for number, swap in enumerate(SWAPS if kind == "cuda" else (0,)):
        given = {"params": sizes, "side": side, "num_text": num_text, "swap": swap, "device": kind}
        try:
            done = subprocess.run(
                [str(python), "-c", _CHILD, json.dumps(given)],
                cwd=checkout,
                capture_output=True,
                text=True,
                timeout=max(20.0, left / (len(SWAPS) - number)),
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            lines.append(f"| | {side} | {swap} | left out: {type(error).__name__} | |")
            continue
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            lines.append(f"| | {side} | {swap} | left out: {reason} | |")
            continue
        seconds, peak = json.loads(done.stdout.splitlines()[-1])
        text = f"{min(seconds):.3f} / {statistics.median(seconds):.3f} / {max(seconds):.3f}"
        lines.append(f"| | {side} | {swap} | {text} | {peak / 1e9:.2f} |")
    return [*lines, ""]
