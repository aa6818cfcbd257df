"""What to say when main memory runs out. No torch: asked before it is loaded."""

from __future__ import annotations

import psutil

from trainer.schema.memory_phases import gib_text


def is_host_out_of_memory(error: BaseException) -> bool:
    """Whether main memory ran out: torch's allocator for the CPU raises a plain RuntimeError."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error) and "allocate" in str(error)
    )


def host_memory_text() -> tuple[str, str]:
    """What to say when main memory ran out, and what helps."""
    memory = psutil.virtual_memory()
    own = psutil.Process().memory_info().rss
    return (
        f"the machine ran out of main memory: this run has {gib_text(own)}, {gib_text(memory.available)} of "
        f"{gib_text(memory.total)} are free",
        "Close other programs, swap fewer blocks, write caches to the disk (cache_latents_to_disk, "
        "cache_text_encoder_outputs_to_disk), or use a smaller batch.",
    )
