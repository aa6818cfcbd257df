"""When memory runs out a run makes room and goes on where it was, with the numbers of a run that had the room from the start.

The shortage is made by what a device does: some of the model's own layers raise torch's error as long as too few blocks
are swapped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.runs.in_process import Answer, answer, small_run, words_of
from tests.tiny import TinyModels, make_tiny_dataset
from trainer.model.autoencoder import AutoEncoder
from trainer.model.flux import Flux, SingleStreamBlock
from trainer.offload.block_swap import BlockSwap
from trainer.train.host_memory import is_host_out_of_memory

MESSAGE = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 8.00 GiB"
STEPS = 3


class Shortage:
    """Raises from the `at`-th pass on as long as fewer than `needed` blocks are swapped."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, needed: int, at: int = 2) -> None:
        self.num_raised = 0
        self.num_passes = 0
        self._needed, self._at = needed, at
        self._swaps: list[BlockSwap] = []
        attach = BlockSwap.attach

        def note(swap: BlockSwap) -> None:
            self._swaps.append(swap)
            attach(swap)

        monkeypatch.setattr(BlockSwap, "attach", note)

    @property
    def num_swapped(self) -> int:
        return self._swaps[-1].blocks_to_swap

    def strike(self) -> None:
        if self.num_passes >= self._at and self.num_swapped < self._needed:
            self.num_raised += 1
            raise torch.OutOfMemoryError(MESSAGE)

    def in_forward(self, monkeypatch: pytest.MonkeyPatch) -> None:
        forward = Flux.forward

        def counted(model: Flux, *inputs: torch.Tensor, **more: object) -> torch.Tensor:
            self.num_passes += 1
            output = forward(model, *inputs, **more)  # pyright: ignore[reportArgumentType]
            self.strike()
            return output

        monkeypatch.setattr(Flux, "forward", counted)

    def in_backward(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """In the middle of it: some gradients are there already, others not."""
        forward, block_forward = Flux.forward, SingleStreamBlock.forward

        def counted(model: Flux, *inputs: torch.Tensor, **more: object) -> torch.Tensor:
            self.num_passes += 1
            return forward(model, *inputs, **more)  # pyright: ignore[reportArgumentType]

        def fails(_gradient: torch.Tensor) -> None:
            self.strike()

        def watched(block: SingleStreamBlock, *inputs: torch.Tensor, **more: object) -> torch.Tensor:
            output = block_forward(block, *inputs, **more)  # pyright: ignore[reportArgumentType]
            if output.requires_grad:
                output.register_hook(fails)
            return output

        monkeypatch.setattr(Flux, "forward", counted)
        monkeypatch.setattr(SingleStreamBlock, "forward", watched)


@pytest.fixture
def run(tiny_models: TinyModels, tmp_path: Path) -> Callable[..., tuple[Answer, str]]:
    dataset = make_tiny_dataset(tmp_path, count=4)

    def train(name: str, *words: str) -> tuple[Answer, str]:
        usual = small_run(tiny_models, dataset, tmp_path / name) | {
            "max_train_steps": str(STEPS),
            "gradient_accumulation_steps": "2",
            "network_dropout": "0.2",
            "seed": "5",
        }
        found = answer(*words_of(usual), *words)
        file = tmp_path / name / "lora.safetensors"
        return found, digest(file) if file.is_file() else ""

    return train


def digest(file: Path) -> str:
    sums = hashlib.sha256()
    for name, tensor in sorted(load_file(file).items()):
        sums.update(name.encode() + tensor.numpy().tobytes())
    return sums.hexdigest()


@pytest.fixture
def own_patches() -> Iterator[pytest.MonkeyPatch]:
    """Undone within the test: the run that is compared with must not fail."""
    patches = pytest.MonkeyPatch()
    yield patches
    patches.undo()


@pytest.mark.parametrize("place", ["forward", "backward"])
@pytest.mark.parametrize("checkpointing", [(), ("--gradient_checkpointing",)])
def test_a_run_that_makes_room_ends_like_one_that_had_it(
    run: Callable[..., tuple[Answer, str]],
    own_patches: pytest.MonkeyPatch,
    place: str,
    checkpointing: tuple[str, ...],
) -> None:
    shortage = Shortage(own_patches, needed=3)
    getattr(shortage, f"in_{place}")(own_patches)
    found, weights = run("short", "--blocks_to_swap=1", *checkpointing)
    own_patches.undo()
    assert found.code == 0, found.output
    assert shortage.num_raised == 2, "one block more each time"
    assert "blocks_to_swap goes from 1 to 2" in found.output
    assert "blocks_to_swap goes from 2 to 3" in found.output
    assert "Tried to allocate 20.00 MiB" in found.output
    plenty, expected = run("plenty", "--blocks_to_swap=3", *checkpointing)
    assert plenty.code == 0, plenty.output
    assert weights == expected


def test_room_is_made_without_any_swap_before(
    run: Callable[..., tuple[Answer, str]], own_patches: pytest.MonkeyPatch
) -> None:
    shortage = Shortage(own_patches, needed=4, at=1)
    shortage.in_forward(own_patches)
    found, weights = run("short")
    own_patches.undo()
    assert found.code == 0, found.output
    assert shortage.num_raised == 4
    assert "in step 1: the estimate was " in found.output
    assert weights == run("plenty")[1]


def test_with_every_block_swapped_the_run_ends_with_what_to_change_and_keeps_its_work(
    run: Callable[..., tuple[Answer, str]], own_patches: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shortage = Shortage(own_patches, needed=99, at=4)
    shortage.in_forward(own_patches)
    found, _ = run("short", "--blocks_to_swap=3")
    own_patches.undo()
    assert found.code == 3
    assert shortage.num_raised == 2
    (problem,) = found.problems
    for text in (
        "ran out of memory in step 2",
        "4 blocks were swapped",
        "Every block that can be swapped is",
        "resolution",
    ):
        assert text in problem
    assert (tmp_path / "short" / "lora-step00000001.safetensors").is_file(), "the first step is kept"


def test_no_oom_recovery_ends_the_run_at_once(
    run: Callable[..., tuple[Answer, str]], own_patches: pytest.MonkeyPatch
) -> None:
    shortage = Shortage(own_patches, needed=2)
    shortage.in_forward(own_patches)
    found, _ = run("short", "--blocks_to_swap=1", "--no_oom_recovery")
    own_patches.undo()
    assert found.code == 3
    assert shortage.num_raised == 1
    assert "raise blocks_to_swap or leave no_oom_recovery out" in found.problems[0]


def test_pictures_that_do_not_fit_together_are_encoded_in_smaller_batches(
    run: Callable[..., tuple[Answer, str]], own_patches: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    encode = AutoEncoder.encode_moments

    def limited(model: AutoEncoder, images: torch.Tensor) -> torch.Tensor:
        sizes.append(len(images))
        if len(images) > 1:
            raise torch.OutOfMemoryError(MESSAGE)
        return encode(model, images)

    own_patches.setattr(AutoEncoder, "encode_moments", limited)
    found, weights = run("short", "--cache_latents", "--vae_batch_size=4")
    own_patches.undo()
    assert found.code == 0, found.output
    assert max(sizes) > 1
    assert "at once do not fit on the device" in found.output
    assert weights == run("plenty", "--cache_latents", "--vae_batch_size=1")[1]


def test_a_sample_that_does_not_fit_is_left_out(
    run: Callable[..., tuple[Answer, str]], own_patches: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fails(_model: AutoEncoder, _latents: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError(MESSAGE)

    own_patches.setattr(AutoEncoder, "decode", fails)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 1\n")
    found, weights = run("short", f"--sample_prompts={prompts}", "--sample_every_n_steps=1")
    own_patches.undo()
    assert found.code == 0, found.output
    assert "sample 1 was not made: the device ran out of memory (CUDA out of memory" in found.output
    assert weights == run("plenty")[1]


def test_main_memory_that_runs_out_is_no_bug(
    run: Callable[..., tuple[Answer, str]], own_patches: pytest.MonkeyPatch
) -> None:
    def fails(*_inputs: object, **_more: object) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: 17 bytes")

    own_patches.setattr(Flux, "forward", fails)
    found, _ = run("short")
    assert found.code == 3
    assert "the machine ran out of main memory: this run has" in found.output
    assert is_host_out_of_memory(MemoryError())
    assert not is_host_out_of_memory(RuntimeError("shapes cannot be multiplied"))


@pytest.mark.parametrize("at", [1, 2])
def test_memory_that_runs_out_in_the_optimizer_is_recovered_where_its_state_is_made_and_else_told(
    run: Callable[..., tuple[Answer, str]], own_patches: pytest.MonkeyPatch, tmp_path: Path, at: int
) -> None:
    calls = 0
    step = torch.optim.AdamW.step

    def breaks_off(optimizer: torch.optim.AdamW, closure: None = None) -> object:
        nonlocal calls
        calls += 1
        if calls == at:
            # The state is there by now, and some weights have changed already.
            step(optimizer, closure)
            raise torch.OutOfMemoryError(MESSAGE)
        return step(optimizer, closure)

    own_patches.setattr(torch.optim.AdamW, "step", breaks_off)
    found, weights = run("short", "--blocks_to_swap=1", "--optimizer_type=AdamW")
    own_patches.undo()
    if at == 1:
        assert found.code == 0, found.output
        assert "out of memory in the optimizer's step" in found.output
        assert weights == run("plenty", "--blocks_to_swap=1", "--optimizer_type=AdamW")[1]
    else:
        assert found.code == 3
        assert "some weights have taken this step" in found.problems[0]
        assert not list(tmp_path.glob("short/*.safetensors")), "no half-taken step is saved"
