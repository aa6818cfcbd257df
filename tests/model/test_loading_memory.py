"""What a process holds while it loads a model: the model and a piece of one tensor, not the model and its files."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.bench.bench_loading import LAYOUTS, Layout, measure_ranks, run, write_plain_file
from trainer.schema.checkpoint_header import FluxParams

# 260 MB in bf16, of which the largest tensor is 14 MB.
MEDIUM = FluxParams(64, 64, 768, 512, 1024, 4.0, 8, 2, 3, (16, 56, 56), 10_000, True, True)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems count mapped pages differently")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loading_takes_the_models_size_and_no_more(tmp_path: Path, layout: Layout) -> None:
    (loaded,) = run(MEDIUM, tmp_path, (layout,))
    assert loaded.model_bytes > (100 if layout == "scaled fp8" else 200) * 10**6
    # 1.1 is usual, whatever the layout; on a busy machine the count scatters. Without handing pages back it would be 2.
    assert loaded.peak_bytes - loaded.baseline_bytes < 1.45 * loaded.file_bytes, loaded
    assert loaded.is_within_bound
    assert list(tmp_path.iterdir()) == [], "the files are removed"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems count mapped pages differently")
def test_weights_that_are_stored_in_fewer_bits_are_never_there_as_a_whole(tmp_path: Path) -> None:
    (plain,) = run(MEDIUM, tmp_path, ("published",))
    (loaded,) = run(MEDIUM, tmp_path, ("published",), "fp8")
    assert loaded.model_bytes < 0.7 * plain.model_bytes
    # The largest weight takes 28 MB in 32 bit, and again while it is stored.
    assert loaded.peak_bytes - loaded.baseline_bytes < 1.45 * loaded.model_bytes + 60 * 10**6, loaded
    assert loaded.is_within_bound


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the measure is Linux's")
def test_two_processes_that_load_share_the_files_pages_and_keep_none(tmp_path: Path) -> None:
    size = 32 * 2**20
    path = write_plain_file(tmp_path / "model.safetensors", num_bytes=size)
    held, handed_back = measure_ranks(path, keeps_pages=True), measure_ranks(path, keeps_pages=False)
    for rank in held:
        assert rank.mapped_bytes >= size
        # The system's proportional count: each page divided by the processes that map it.
        assert rank.share_bytes == pytest.approx(size / 2, rel=0.05)
    for rank in handed_back:
        assert rank.mapped_bytes < size / 8
