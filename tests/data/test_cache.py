from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.data.specs import SUBSET, one_dataset, picture
from trainer.data.cache import (
    CacheRequest,
    TensorCache,
    latent_key,
    latent_requests,
    text_key,
    text_requests,
)
from trainer.data.cache_files import CACHE_FOLDER, Entry, read_entry
from trainer.data.index import index_dataset
from trainer.data.items import DatasetIndex
from trainer.schema.base import UserError
from trainer.schema.dataset_keys import SubsetSpec


class Encoder:
    """Halves the resolution and counts what it was asked for."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, ...]] = []

    def __call__(self, keys: list[str], inputs: list[Tensor]) -> Sequence[Entry]:
        batch = torch.stack(inputs)
        assert len(keys) == len(inputs)
        self.batches.append(tuple(batch.shape))
        means = torch.nn.functional.avg_pool2d(batch, 2).to(torch.bfloat16)
        return [{"latents": row, "peak": row.amax()} for row in means]


def no_warning(text: str) -> None:
    pytest.fail(f"unexpected warning: {text}")


def index_of(folder: Path, *, subset: SubsetSpec = SUBSET, count: int = 4) -> DatasetIndex:
    for number in range(count):
        size = (64, 64) if number % 2 else (120, 60)
        picture(folder / f"{number}.png", *size, seed=number, caption=f"picture {number}")
    return index_dataset(one_dataset(replace(subset, image_dir=folder)))


def disk_cache() -> TensorCache:
    return TensorCache("latents", on_disk=True, warn=no_warning)


def cached_files(folder: Path) -> list[Path]:
    return sorted((folder / CACHE_FOLDER).iterdir())


def test_memory_holds_what_the_encoder_gave_and_writes_no_file(tmp_path: Path) -> None:
    requests = latent_requests(index_of(tmp_path), encoder="ae")
    cache = TensorCache("latents", on_disk=False, warn=no_warning)
    encoder = Encoder()
    seen: list[tuple[int, int]] = []
    cache.fill(requests, encoder, batch_size=3, progress=lambda done, total: seen.append((done, total)))
    assert sorted(encoder.batches) == [(2, 3, 48, 80), (2, 3, 64, 64)]
    assert seen == [(2, 4), (4, 4)]
    assert len(cache) == 4
    for request in requests:
        expected = encoder([request.key], [request.load()])[0]
        assert torch.equal(cache[request.key]["latents"], expected["latents"])
        assert cache[request.key]["latents"].untyped_storage().nbytes() == expected["latents"].numel() * 2
    assert not (tmp_path / CACHE_FOLDER).exists()


def test_a_second_run_finds_the_files_and_encodes_nothing(tmp_path: Path) -> None:
    requests = latent_requests(index_of(tmp_path), encoder="ae")
    first, second, encoder = disk_cache(), disk_cache(), Encoder()
    first.fill(requests, encoder, batch_size=2)
    assert len(cached_files(tmp_path)) == 4
    assert second.missing(requests) == []
    second.fill(requests, encoder, batch_size=2)
    assert len(encoder.batches) == 2
    for request in requests:
        one, other = first[request.key], second[request.key]
        assert torch.equal(one["latents"], other["latents"])
        assert one["latents"].dtype == torch.bfloat16
        assert one["peak"].shape == other["peak"].shape == ()
        assert torch.equal(one["peak"], other["peak"])


def test_the_cache_folder_is_not_taken_for_pictures_and_changes_no_key(tmp_path: Path) -> None:
    requests = latent_requests(index_of(tmp_path), encoder="ae")
    disk_cache().fill(requests, Encoder())
    again = latent_requests(index_of(tmp_path), encoder="ae")
    assert [request.key for request in again] == [request.key for request in requests]


def test_a_replaced_picture_is_encoded_again_and_the_others_are_not(tmp_path: Path) -> None:
    disk_cache().fill(latent_requests(index_of(tmp_path), encoder="ae"), Encoder())
    picture(tmp_path / "1.png", 64, 64, seed=99)
    index = index_dataset(one_dataset(replace(SUBSET, image_dir=tmp_path)))
    missing = disk_cache().missing(latent_requests(index, encoder="ae"))
    assert [request.key for request in missing] == [
        latent_key(index.items[1].centre_pictures()[0], encoder="ae"),
    ]


def test_a_renamed_picture_is_found_under_its_new_name(tmp_path: Path) -> None:
    disk_cache().fill(latent_requests(index_of(tmp_path), encoder="ae"), Encoder())
    (tmp_path / "1.png").rename(tmp_path / "cat.png")
    index = index_dataset(one_dataset(replace(SUBSET, image_dir=tmp_path, class_tokens="x")))
    assert disk_cache().missing(latent_requests(index, encoder="ae")) == []


def test_everything_that_changes_the_latents_changes_the_key(tmp_path: Path) -> None:
    item = index_of(tmp_path).items[0]
    (base,) = item.centre_pictures()
    others = [
        replace(base, digest="0"),
        replace(base, resized=(100, 50)),
        replace(base, bucket=(32, 32)),
        replace(base, crop=(1, 0)),
        replace(base, is_flipped=True),
        replace(base, resize_interpolation="lanczos"),
    ]
    keys = {latent_key(each, encoder="ae") for each in [base, *others]} | {latent_key(base, encoder="other")}
    assert len(keys) == 8
    assert latent_key(replace(base, path=Path("elsewhere.png")), encoder="ae") == latent_key(base, encoder="ae")


def test_everything_that_changes_a_text_encoding_changes_the_key() -> None:
    base = partial(text_key, encoder="t5", max_length=512, apply_mask=True)
    keys = {
        base("a cat"),
        base("a cat "),
        base("a cat", encoder="clip"),
        base("a cat", max_length=256),
        base("a cat", apply_mask=False),
    }
    assert len(keys) == 5
    assert base("a cat") == base("a cat")


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "garbage", "swap"])
def test_a_damaged_file_is_computed_again(tmp_path: Path, damage: str) -> None:
    requests = latent_requests(index_of(tmp_path), encoder="ae")
    disk_cache().fill(requests, Encoder())
    victim, other = cached_files(tmp_path)[:2]
    good = victim.read_bytes()
    flipped = bytearray(good)
    flipped[-5] ^= 0x10
    victim.write_bytes(
        {
            "truncate": good[:-7],
            "flip": bytes(flipped),
            "empty": b"",
            "garbage": b"\xff" * 500,
            "swap": other.read_bytes(),
        }[damage]
    )
    cache, encoder = disk_cache(), Encoder()
    cache.fill(requests, encoder)
    assert len(encoder.batches) == 1
    assert victim.read_bytes() == good


def test_damage_during_the_run_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    requests = latent_requests(index_of(tmp_path), encoder="ae")
    cache = disk_cache()
    cache.fill(requests, Encoder())
    for file in cached_files(tmp_path):
        file.unlink()
    with pytest.raises(UserError, match=r"latents-.*\.safetensors vanished or was damaged"):
        cache[requests[0].key]


def test_skipping_the_check_reads_no_file_until_it_is_used(tmp_path: Path) -> None:
    """What `--skip_cache_check` asks for."""
    requests = latent_requests(index_of(tmp_path), encoder="ae")
    disk_cache().fill(requests, Encoder())
    cached_files(tmp_path)[0].write_bytes(b"damaged")
    cache = TensorCache("latents", on_disk=True, warn=no_warning, skip_check=True)
    assert cache.missing(requests) == []
    assert len(disk_cache().missing(requests)) == 1


def test_an_interruption_keeps_what_was_encoded_before(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    requests = latent_requests(index_of(tmp_path), encoder="ae")
    calls: list[int] = []

    def check_commands() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise Stop

    with pytest.raises(Stop):
        disk_cache().fill(requests, Encoder(), check_commands=check_commands)
    encoder = Encoder()
    disk_cache().fill(requests, encoder)
    assert len(encoder.batches) == 2
    assert {path.suffix for path in cached_files(tmp_path)} == {".safetensors"}


def test_a_folder_that_cannot_be_written_is_reported_once_and_memory_is_used(tmp_path: Path) -> None:
    requests = latent_requests(index_of(tmp_path), encoder="ae")
    # A file where the folder should be stops every user from writing there, root too.
    (tmp_path / CACHE_FOLDER).write_text("in the way")
    warnings: list[str] = []
    cache = TensorCache("latents", on_disk=True, warn=warnings.append)
    cache.fill(requests, Encoder())
    assert [warning.split(" (")[0] for warning in warnings] == [f"{tmp_path / CACHE_FOLDER} cannot be written"]
    assert warnings[0].endswith("its cached latents stay in memory")
    assert all(request.key in cache for request in requests)
    assert cache[requests[0].key]["latents"].shape == (3, 24, 40)


def test_a_full_disk_leaves_no_part_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, target: Path) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    requests = latent_requests(index_of(tmp_path), encoder="ae")
    warnings: list[str] = []
    cache = TensorCache("latents", on_disk=True, warn=warnings.append)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        cache.fill(requests, Encoder())
    assert "no space left on device" in warnings[0]
    assert cached_files(tmp_path) == []
    assert len(cache) == 4


def test_both_orientations_are_encoded_where_a_picture_may_be_flipped(tmp_path: Path) -> None:
    index = index_of(tmp_path, subset=replace(SUBSET, flip_aug=True), count=2)
    requests = latent_requests(index, encoder="ae")
    cache = TensorCache("latents", on_disk=False, warn=no_warning)
    cache.fill(requests, Encoder(), batch_size=8)
    assert len(cache) == 4
    for item in index.items:
        plain, mirrored = (cache[latent_key(each, encoder="ae")]["latents"] for each in item.centre_pictures())
        assert torch.equal(mirrored, plain.flip(2))


def test_the_same_file_twice_is_encoded_once(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", seed=1)
    picture(tmp_path / "b.png", seed=1)
    index = index_dataset(one_dataset(replace(SUBSET, image_dir=tmp_path)))
    encoder = Encoder()
    cache = TensorCache("latents", on_disk=False, warn=no_warning)
    cache.fill(latent_requests(index, encoder="ae"), encoder)
    assert len(encoder.batches) == len(cache) == 1


def test_texts_are_encoded_once_and_found_by_all_that_decides_them(tmp_path: Path) -> None:
    texts = {"a cat": tmp_path, "": tmp_path, "a prompt": None}
    requests = text_requests(texts, encoder="t5", max_length=64, apply_mask=False)
    assert [(request.load(), request.folder) for request in requests] == list(texts.items())

    def encode(_keys: list[str], texts: list[str]) -> Sequence[Entry]:
        return [{"length": torch.tensor([len(text)])} for text in texts]

    cache = TensorCache("text", on_disk=True, warn=no_warning)
    cache.fill(requests, encode, batch_size=3)
    assert len(cached_files(tmp_path)) == 2
    assert [int(cache[request.key]["length"]) for request in requests] == [5, 0, 8]
    later = TensorCache("text", on_disk=True, warn=no_warning)
    assert [request.load() for request in later.missing(requests)] == ["a prompt"]
    other = text_requests(texts, encoder="t5", max_length=64, apply_mask=True)
    assert len(later.missing(other)) == 3


def test_random_crops_cannot_be_encoded_beforehand(tmp_path: Path) -> None:
    index = index_of(tmp_path, subset=replace(SUBSET, random_crop=True), count=1)
    with pytest.raises(UserError, match="random_crop cannot be used together with cache_latents") as failure:
        latent_requests(index, encoder="ae")
    assert failure.value.exit_code == 2


def test_an_error_of_the_encoder_passes_through(tmp_path: Path) -> None:
    def fail(_keys: list[str], _inputs: list[str]) -> Sequence[Entry]:
        raise RuntimeError("out of memory")

    cache = TensorCache("text", on_disk=False, warn=no_warning)
    with pytest.raises(RuntimeError, match="out of memory"):
        cache.fill([CacheRequest("k", None, (), lambda: "text")], fail)


def test_what_gets_lost_during_the_run_is_computed_again_all_at_once(tmp_path: Path) -> None:
    requests = latent_requests(index_of(tmp_path), encoder="ae")
    warnings: list[str] = []
    cache, encoder = TensorCache("latents", on_disk=True, warn=warnings.append), Encoder()
    cache.fill(requests, encoder)
    expected = {request.key: cache[request.key]["latents"] for request in requests}
    loads: list[int] = []

    def load_encoder() -> Encoder:
        loads.append(1)
        return encoder

    cache.recover_with(requests, load_encoder)
    files = cached_files(tmp_path)
    for file in files[1:]:
        file.unlink()
    lost = [request for request in requests if request.key not in files[0].name]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda request: cache[request.key]["latents"], lost))
    assert all(torch.equal(latents, expected[request.key]) for latents, request in zip(found, lost, strict=True))
    assert len(loads) == 1, "threads that miss entries at the same time load one encoder"
    assert [warning.split(" vanished")[0] for warning in warnings] == ["3 cached latents"]
    assert torch.equal(cache[requests[0].key]["latents"], expected[requests[0].key])
    assert {request.key for request in requests} == {
        file.stem.removeprefix("latents-") for file in cached_files(tmp_path)
    }


def test_a_picture_that_changes_while_it_is_encoded_leaves_no_entry(tmp_path: Path) -> None:
    requests = latent_requests(index_of(tmp_path), encoder="ae")
    picture(tmp_path / "2.png", 120, 60, seed=77)
    with pytest.raises(UserError, match=r"2\.png was changed after the start of the run"):
        disk_cache().fill(requests, Encoder())
    assert not any(requests[2].key in file.name for file in cached_files(tmp_path))


def test_what_another_process_has_written_meanwhile_is_taken_over(tmp_path: Path) -> None:
    requests = latent_requests(index_of(tmp_path), encoder="ae")
    slow, fast, encoder = disk_cache(), disk_cache(), Encoder()

    def encode(keys: list[str], inputs: list[Tensor]) -> Sequence[Entry]:
        if not len(fast):
            fast.fill(requests, Encoder())
        return encoder(keys, inputs)

    slow.fill(requests, encode)
    assert len(encoder.batches) == 1
    assert len(slow) == 4


_FILL = """
import sys, time
from functools import partial
from pathlib import Path
import torch
from trainer.data.cache import CacheRequest, TensorCache

folder, name = Path(sys.argv[1]), sys.argv[2]

def load(number):
    return number

def encode(keys, numbers):
    # Both start at the same moment and write the same entries all the time.
    while not (folder / "go").exists():
        time.sleep(0.001)
    time.sleep(0.002)
    return [{"value": torch.full((1000,), float(number))} for number in numbers]

cache = TensorCache("latents", on_disk=True, warn=lambda text: sys.exit(text))
requests = [CacheRequest(f"{number:040x}", folder, (), partial(load, number)) for number in range(60)]
(folder / f"ready-{name}").touch()
cache.fill(requests, encode)
for number, request in enumerate(requests):
    assert torch.equal(cache[request.key]["value"], torch.full((1000,), float(number)))
"""


def test_two_processes_build_one_cache_at_the_same_time(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _FILL, str(tmp_path)]
    processes = [subprocess.Popen([*command, name], stderr=subprocess.PIPE, text=True) for name in ("a", "b")]
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("ready-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    (tmp_path / "go").touch()
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    files = cached_files(tmp_path)
    assert [file.name for file in files] == [f"latents-{number:040x}.safetensors" for number in range(60)]
    for number, file in enumerate(files):
        entry = read_entry(file, f"{number:040x}")
        assert entry is not None
        assert torch.equal(entry["value"], torch.full((1000,), float(number)))


def test_the_processes_of_one_training_divide_the_work(tmp_path: Path) -> None:
    requests = [CacheRequest(f"{number:040x}", tmp_path, (), partial(int, number)) for number in range(30)]
    caches = [disk_cache(), disk_cache()]
    encoded: list[list[int]] = [[], []]

    def fill(rank: int) -> None:
        def encode(_keys: list[str], numbers: list[int]) -> Sequence[Entry]:
            time.sleep(0.005)
            encoded[rank].extend(numbers)
            return [{"value": torch.tensor(float(number))} for number in numbers]

        caches[rank].fill(requests, encode, share=(rank, 2))

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(fill, range(2)))
    assert [numbers[0] for numbers in encoded] == [0, 15]
    # Only what both were at in the same moment is made twice.
    assert 30 <= sum(map(len, encoded)) <= 34
    for cache in caches:
        assert [float(cache[request.key]["value"]) for request in requests] == list(range(30))


def test_the_time_of_a_file_says_when_it_was_last_used(tmp_path: Path) -> None:
    requests = latent_requests(index_of(tmp_path), encoder="ae")
    disk_cache().fill(requests, Encoder())
    for file in cached_files(tmp_path):
        os.utime(file, (0, 0))
    disk_cache().missing(requests[:1])
    used = [file for file in cached_files(tmp_path) if file.stat().st_mtime > 0]
    assert [file.stem for file in used] == [f"latents-{requests[0].key}"]
