"""Hashes of model files, computed beside the training."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

from trainer.train.file_hashes import FileHashes, files_identity


def never() -> bool:
    return False


def test_the_hashes_are_those_of_the_whole_files_and_a_folder_has_none(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a" * 1_000_000)
    (tmp_path / "b").write_bytes(b"b")
    files = {"flux": tmp_path / "a", "ae": tmp_path / "b", "t5xxl": tmp_path, "clip_l": tmp_path / "missing"}
    hashes = FileHashes(files, None)
    assert hashes.is_done
    hashes.start()
    assert hashes.finish(never) == {
        name: hashlib.sha256(files[name].read_bytes()).hexdigest() for name in ("flux", "ae")
    }
    hashes.close()


def test_a_file_is_read_again_only_when_it_has_changed(tmp_path: Path) -> None:
    model, memory = tmp_path / "model", tmp_path / "home" / "hashes.json"
    model.write_bytes(b"first")

    def of_model() -> str:
        hashes = FileHashes({"flux": model}, memory)
        hashes.start()
        return hashes.finish(never)["flux"]

    first = of_model()
    known = json.loads(memory.read_text(encoding="utf-8"))
    memory.write_text(json.dumps(dict.fromkeys(known, "remembered")), encoding="utf-8")
    assert of_model() == "remembered"
    model.write_bytes(b"other")
    os.utime(model, ns=(1, 1))
    assert of_model() == hashlib.sha256(b"other").hexdigest() != first
    memory.write_text("no JSON", encoding="utf-8")
    assert of_model() == hashlib.sha256(b"other").hexdigest()


def test_closing_ends_the_reading_of_a_large_file(tmp_path: Path) -> None:
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(40 << 30)
    hashes = FileHashes({"flux": large}, None)
    hashes.start()
    assert hashes.ready() == {}
    assert hashes.finish(lambda: True) == {}
    started = time.monotonic()
    hashes.close()
    assert time.monotonic() - started < 15  # the whole of it would take twice that
    assert hashes.is_done


def test_the_identity_of_a_model_follows_every_byte_and_no_name(tmp_path: Path) -> None:
    data = bytearray(b"x" * 3_000_000)
    memory, checks = tmp_path / "hashes.json", list[int]()

    def identity(*names: str) -> str:
        return files_identity([tmp_path / name for name in names], memory, lambda: checks.append(1))

    (tmp_path / "a").write_bytes(data)
    (tmp_path / "b").write_bytes(data)
    assert identity("a") == identity("b") == hashlib.sha256(data).hexdigest()
    num_checks = len(checks)
    assert num_checks > 0
    assert identity("b", "a") == f"{identity('a')}+{identity('a')}"
    assert len(checks) == num_checks, "nothing was read again"
    data[1_234_567] ^= 1
    (tmp_path / "b").write_bytes(data)
    os.utime(tmp_path / "b", ns=(5, 5))
    assert identity("b") == hashlib.sha256(data).hexdigest()
