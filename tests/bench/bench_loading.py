"""Peak memory and time of loading the transformer, each load in a process of its own.

    python -m tests.bench.bench_loading --gigabytes 4        files of about that size; the disk needs as much
    python -m tests.bench.bench_loading --size tiny          seconds; proves only that it runs

The bound is the size of the files plus 2 GB; fp8 files are kept as they are, as in training. With `--storage` the blocks
are stored in that form while they are read, and the bound is the finished model's size plus 2 GB, whatever the files take
(with `compute` an fp8 file becomes a bf16 model of twice its size). Peak memory is the process's largest resident set,
mapped pages of the files counted, as the system reports it. On Linux, two processes then map one file at once: `mapped` is
what each has of it, `share` what the system counts for it, each page divided by the processes that map it.
"""

from __future__ import annotations

import argparse
import json
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

if __name__ == "__main__":
    # Also as a script: `python tests/bench/bench_loading.py`.
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from trainer.schema.checkpoint_header import FluxParams
from trainer.schema.key_names import flux_in_diffusers
from trainer.schema.model_shapes import flux_shapes
from trainer.schema.storage import Storage

Layout = Literal["published", "diffusers shards", "scaled fp8"]
LAYOUTS: tuple[Layout, ...] = ("published", "diffusers shards", "scaled fp8")
MARGIN_BYTES = 2 * 10**9
NUM_SHARDS = 3
_CHUNK = bytes(range(1, 256)) * (1 << 16)
_SIZES = {"BF16": 2, "F8_E4M3": 1, "F32": 4}


@dataclass(frozen=True)
class Loaded:
    """What one load took."""

    layout: Layout
    file_bytes: int
    model_bytes: int
    baseline_bytes: int
    peak_bytes: int
    seconds: float
    storage: Storage | None = None

    @property
    def bound_bytes(self) -> int:
        return (self.file_bytes if self.storage is None else self.model_bytes) + MARGIN_BYTES

    @property
    def is_within_bound(self) -> bool:
        return self.peak_bytes <= self.bound_bytes


def flux_of_about(gigabytes: float) -> FluxParams:
    """A model of the published proportions and widths whose bf16 weights take about this much, by its depth."""
    blocks = max(1, round(gigabytes * 1e9 / 2 / 480e6))  # one double block has 340 M parameters, one single block 141 M
    return FluxParams(64, 64, 768, 4096, 3072, 4.0, 24, blocks, blocks, (16, 56, 56), 10_000, True, True)


def tiny_flux() -> FluxParams:
    return FluxParams(64, 64, 32, 48, 64, 4.0, 2, 2, 2, (4, 14, 14), 10_000, True, True)


def write_model(folder: Path, params: FluxParams, layout: Layout) -> Path:
    """Files with every tensor of the model, filled with non-zero bytes; returns what `load_flux` takes."""
    shapes = flux_shapes(params)
    if layout == "published":
        return _write(folder / "flux.safetensors", {name: ("BF16", shape) for name, shape in shapes.items()})
    if layout == "scaled fp8":
        return _write(folder / "flux.safetensors", dict(_scaled(shapes)))
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        parts = flux_in_diffusers(name)
        rows = (
            [shape[0] // 3] * 3 if len(parts) == 3 else [params.hidden_size] * 3 + [shape[0] - 3 * params.hidden_size]
        )
        for part, count in zip(parts, rows if len(parts) > 2 else [shape[0]] * 2, strict=False):
            tensors[part.name] = ("BF16", (count, *shape[1:]))
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for number in range(NUM_SHARDS):
        file = f"diffusion_pytorch_model-{number + 1:05d}-of-{NUM_SHARDS:05d}.safetensors"
        share = names[number::NUM_SHARDS]
        _write(folder / file, {name: tensors[name] for name in share})
        weight_map |= dict.fromkeys(share, file)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    return folder


def _scaled(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
    yield "scaled_fp8", ("F8_E4M3", (0,))
    for name, shape in shapes.items():
        if len(shape) == 2:
            yield name, ("F8_E4M3", shape)
            yield name.replace(".weight", ".scale_weight"), ("F32", ())
        else:
            yield name, ("BF16", shape)


def _write(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> Path:
    header: dict[str, object] = {}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        num_bytes = _SIZES[dtype]
        for size in shape:
            num_bytes *= size
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + num_bytes]}
        offset += num_bytes
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        while offset > 0:
            offset -= file.write(_CHUNK[: min(offset, len(_CHUNK))])
    return path


_CHILD = """
import json, resource, sys, time
from pathlib import Path
import torch
from trainer.model.weights import load_flux
unit = 1 if sys.platform == "darwin" else 1024
baseline = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
start = time.perf_counter()
from trainer.schema.checkpoint_header import flux_params
from trainer.schema.options import Options
from trainer.schema.storage import stored_as
from trainer.schema.weight_files import read_weights
path = Path(sys.argv[1])
given = Options.model_validate({"base_storage": sys.argv[2] or None})
storage = stored_as(given, flux_params(read_weights(path, "flux")))
model = load_flux(path, torch.bfloat16, "cpu", storage=None if storage == "compute" else storage)
seconds = time.perf_counter() - start
model_bytes = sum(parameter.nbytes for parameter in model.parameters())
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
print(json.dumps([baseline, peak, model_bytes, seconds]))
"""


def measure(path: Path, layout: Layout, storage: Storage | None = None) -> Loaded:
    """Loads the model at `path` for bf16 or in `storage` into main memory, in a new process."""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, str(path), storage or ""],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
        timeout=900,
    )
    baseline, peak, model_bytes, seconds = json.loads(done.stdout.splitlines()[-1])
    files = path.glob("*.safetensors") if path.is_dir() else [path]
    return Loaded(layout, sum(file.stat().st_size for file in files), model_bytes, baseline, peak, seconds, storage)


@dataclass(frozen=True)
class Rank:
    """What one of two processes that map the same file has of it in memory, and its share of what both have."""

    mapped_bytes: int
    share_bytes: int


_RANK_CHILD = """
import json, sys
from pathlib import Path
from trainer.model.mapped_file import MappedFile
from trainer.schema.safetensors_header import read_header
path = Path(sys.argv[1]).resolve()
class Keeping(MappedFile):
    def _hand_back(self, start, num_bytes):
        pass
file = (Keeping if sys.argv[2] == "keep" else MappedFile)(path)
for info in read_header(path).tensors.values():
    file.read(info)
print("read", flush=True)
sys.stdin.readline()
found, counts = False, {}
for line in Path("/proc/self/smaps").read_text().splitlines():
    name, _, rest = line.partition(" ")
    if not name.endswith(":"):
        found = line.endswith(str(path))
    elif found and name in ("Rss:", "Pss:"):
        counts[name] = counts.get(name, 0) + 1024 * int(rest.split()[0])
print(json.dumps([counts["Rss:"], counts["Pss:"]]), flush=True)
sys.stdin.readline()
"""


def measure_ranks(path: Path, *, keeps_pages: bool, num_ranks: int = 2) -> list[Rank]:
    """Processes that read all of `path` at once. `keeps_pages` leaves out what loading does: handing them back."""
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", _RANK_CHILD, str(path), "keep" if keeps_pages else "hand back"]
    with ExitStack() as stack:
        ranks = [
            stack.enter_context(
                subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            )
            for _ in range(num_ranks)
        ]
        # Each step is made by all before the next: nobody counts before all have read, or goes before all have counted.
        answers: list[str] = []
        for _ in range(2):
            answers = [rank.stdout.readline() for rank in ranks if rank.stdout is not None]
            for rank in ranks:
                if rank.stdin is not None:
                    rank.stdin.write("\n")
                    rank.stdin.flush()
    return [Rank(*json.loads(answer)) for answer in answers]


def write_plain_file(path: Path, *, num_bytes: int) -> Path:
    """A file of eight equal bf16 tensors."""
    return _write(path, {f"tensor{index}": ("BF16", (num_bytes // 16,)) for index in range(8)})


def run(
    params: FluxParams, folder: Path, layouts: Sequence[Layout] = LAYOUTS, storage: Storage | None = None
) -> list[Loaded]:
    """One load of each layout; the files are made and removed one after the other."""
    results: list[Loaded] = []
    for layout in layouts:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            results.append(measure(write_model(Path(place), params, layout), layout, storage))
    return results


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.bench_loading")
    parser.add_argument("--size", choices=("real", "tiny"), default="real")
    parser.add_argument("--gigabytes", type=float, default=4.0, help="bf16 size of the model")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the files are made")
    parser.add_argument("--storage", choices=("compute", "fp8", "int8", "nf4"))
    arguments = parser.parse_args()
    params = tiny_flux() if arguments.size == "tiny" else flux_of_about(arguments.gigabytes)
    started = time.monotonic()
    print(f"{'layout':<18}{'files GB':>9}{'model GB':>9}{'start GB':>9}{'peak GB':>9}{'bound GB':>9}{'seconds':>9}")
    results = run(params, arguments.folder, storage=arguments.storage)
    for loaded in results:
        sizes = (loaded.file_bytes, loaded.model_bytes, loaded.baseline_bytes, loaded.peak_bytes, loaded.bound_bytes)
        print(f"{loaded.layout:<18}" + "".join(f"{size / 1e9:>9.2f}" for size in sizes) + f"{loaded.seconds:>9.1f}")
    if sys.platform == "linux":
        with tempfile.TemporaryDirectory(dir=arguments.folder) as place:
            size = 2**20 if arguments.size == "tiny" else 2**30
            path = write_plain_file(Path(place) / "model.safetensors", num_bytes=size)
            for text, keeps in (("pages kept", True), ("handed back", False)):
                for rank in measure_ranks(path, keeps_pages=keeps):
                    share, mapped = rank.share_bytes / 1e9, rank.mapped_bytes / 1e9
                    print(
                        f"one of two processes, {text:<12} file {size / 1e9:.2f} GB, mapped {mapped:.2f}, share {share:.2f}"
                    )
    print(f"in all {time.monotonic() - started:.0f} s")
    return 0 if all(loaded.is_within_bound for loaded in results) else 1


if __name__ == "__main__":
    sys.exit(main())
