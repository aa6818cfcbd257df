"""What fits a card and a machine: the fewest swapped blocks, other ways that fit, and why nothing does."""

from __future__ import annotations

import itertools

import pytest

from tests.schema.test_memory import usual_options
from trainer.schema.memory import usable_bytes
from trainer.schema.memory_phases import GIB, KINDS
from trainer.schema.memory_plan import Plan, plan_for, usable_host_bytes
from trainer.schema.options import Options
from trainer.schema.parameter_counts import PUBLISHED_DEV
from trainer.schema.step_time import forward_flops, rates_for, step_time, step_transfer_bytes


def plan(vram_gib: float | None, ram_gib: float | None = None, **changes: object) -> Plan:
    options = usual_options(optimizer_type="AdamW8bit", resolution="1024", **changes)
    in_bytes = [None if gib is None else round(gib * GIB) for gib in (vram_gib, ram_gib)]
    return plan_for(options, *in_bytes)


def test_without_limits_the_plan_is_the_estimate_of_the_options() -> None:
    found = plan(None, blocks_to_swap=18)
    assert found.fits
    assert found.choice.blocks_to_swap == 18
    assert found.usable_vram_bytes is None


def test_the_choice_is_the_smallest_count_that_fits() -> None:
    found = plan(16)
    assert found.fits
    assert 0 < found.choice.blocks_to_swap < 38
    assert found.choice.estimate.peak_bytes <= usable_bytes(16 * GIB)
    fewer = plan(None, blocks_to_swap=found.choice.blocks_to_swap - 1)
    assert fewer.choice.estimate.peak_bytes > usable_bytes(16 * GIB)


def test_alternatives_fit_and_come_fastest_first() -> None:
    found = plan(80, 64)
    assert found.alternatives[0].changes == {"gradient_checkpointing": False, "blocks_to_swap": 0}
    assert {other.changes.get("base_storage") for other in found.alternatives} == {None, "fp8", "int8", "nf4"}
    assert found.alternatives[0].step_time_ratio == pytest.approx(0.70, abs=0.02), "no second forward pass"
    for other in plan(48, 64).alternatives:
        assert other.estimate.peak_bytes <= usable_bytes(48 * GIB)
        assert other.estimate.host_peak_bytes <= usable_host_bytes(64 * GIB)
    careless = plan(24, None, mixed_precision="no", cache_text_encoder_outputs=False, cache_latents=False)
    assert not careless.fits
    seconds = [other.step_seconds for other in careless.alternatives]
    assert seconds == sorted(seconds)
    assert careless.alternatives[0].changes["mixed_precision"] == "bf16"
    assert careless.alternatives[0].changes["cache_text_encoder_outputs"] is True


def test_less_storage_needs_less_of_both_memories() -> None:
    """What the storage is for: 1024 pixels on 8 GiB with 16 GiB of main memory."""
    found = plan(8, 16)
    assert not found.fits
    assert "main memory" in found.impossible[0]
    assert {str(other.changes["base_storage"]) for other in found.alternatives} == {"fp8", "int8", "nf4"}
    for other in found.alternatives:
        assert other.estimate.host_peak_bytes <= usable_host_bytes(16 * GIB)
        assert other.step_time_ratio < 1.1
    stored = plan(8, 16, base_storage="fp8")
    assert stored.fits
    assert stored.choice.blocks_to_swap < found.choice.blocks_to_swap
    back = [other.changes for other in plan(80, base_storage="fp8").alternatives]
    assert {"base_storage": None, "blocks_to_swap": 0} in back
    old = [other.changes for other in plan(80, fp8_base=True).alternatives]
    assert {"fp8_base": False, "blocks_to_swap": 0} in old


def test_levers_are_proposed_where_they_help() -> None:
    """Selective checkpointing where memory is left; modulation from the file and inputs off the device where it is not."""
    fastest = plan(24, 32, base_storage="fp8").alternatives[0]
    assert 0 < int(str(fastest.changes["checkpoint_blocks"])) < 57
    assert fastest.step_time_ratio < 0.97
    assert fastest.blocks_to_swap == 0
    stored = plan(6, 16, base_storage="fp8")
    assert not stored.fits
    off = [other for other in stored.alternatives if other.changes.get("offload_modulation") == "file"]
    assert any("base_storage" not in other.changes for other in off), "1024 pixels in fp8 on 6 and 16 GiB"
    assert any(other.changes.get("cpu_offload_checkpointing") for other in off)
    for other in (fastest, *off):
        assert other.estimate.host_peak_bytes <= usable_host_bytes(32 * GIB)
    for other in plan(6, 16, model_type="chroma").alternatives:
        assert "offload_modulation" not in other.changes, "Chroma has none"


def test_what_does_not_fit_says_which_memory_and_why() -> None:
    device = plan(3)
    assert not device.fits
    assert "training needs" in device.impossible[0]
    assert all("resolution" in other.changes for other in device.alternatives), "the same size never fits"
    host = plan(8, 8)
    assert not host.fits
    assert "main memory are needed, of which" in host.impossible[0]
    assert "are swapped blocks" in host.impossible[0]
    assert plan(8).fits, "it is the host alone that is too small"
    nothing = plan(2, 4)
    assert nothing.alternatives == ()
    assert "No setting that was tried fits" in nothing.impossible[-1]


def test_the_bars_add_up_to_the_peaks_by_kind() -> None:
    choice = plan(12).choice
    assert sum(segment.bytes for segment in choice.device_bar) == choice.estimate.peak_bytes
    assert sum(segment.bytes for segment in choice.host_bar) == choice.estimate.host_peak_bytes
    kinds = [segment.kind for segment in choice.device_bar]
    assert kinds == [kind for kind in KINDS if kind in kinds]
    assert set(kinds) == set(KINDS)
    for phase in choice.estimate.phases:
        assert sum(phase.split().values()) == phase.peak_bytes


def test_what_is_assumed_is_said() -> None:
    lines = " ".join(plan_for(usual_options()).assumptions)
    for text in ("FLUX.1-dev", "1024 pixels", "50 pictures", "not measured"):
        assert text in lines
    assert "Chroma1" in " ".join(plan_for(usual_options(model_type="chroma")).assumptions)
    known = plan_for(usual_options(), flux=PUBLISHED_DEV, size=(512, 512), batch_size=1, num_pictures=3).assumptions
    assert [line for line in known if "not measured" not in line] == []


def test_on_a_cpu_nothing_is_swapped() -> None:
    assert plan(8, device="cpu").choice.blocks_to_swap == 0


def test_auto_counts_as_no_swap_until_a_card_is_known() -> None:
    assert plan(None, blocks_to_swap="auto").choice.blocks_to_swap == 0
    assert plan(12, blocks_to_swap="auto").choice.blocks_to_swap == plan(12).choice.blocks_to_swap > 0


# ---- step times ----


@pytest.mark.parametrize(
    ("side", "num_text", "forward", "step"),
    [
        (512, 512, 21.5, 66.9),
        (512, 64, 14.9, 45.9),
        (768, 512, 41.9, 134),
        (1024, 512, 74.4, 245),
        (1024, 64, 65.8, 216),
    ],
)
def test_the_work_of_a_step_is_that_of_the_shapes(side: int, num_text: int, forward: float, step: float) -> None:
    options = usual_options(t5xxl_max_token_length=num_text)
    found = step_time(
        PUBLISHED_DEV, options, width=side, height=side, batch_size=1, blocks_to_swap=0, rates=rates_for(None)
    )
    assert found.forward_flops / 1e12 == pytest.approx(forward, rel=0.005)
    assert (found.forward_flops + found.backward_flops) / 1e12 == pytest.approx(step, rel=0.005)
    assert sum(forward_flops(PUBLISHED_DEV, 16, 4, 2)) == 2 * sum(forward_flops(PUBLISHED_DEV, 16, 4, 1))


def test_swapped_blocks_come_twice_a_step_but_for_those_that_are_still_there() -> None:
    double, single = 2 * 339_738_624, 2 * 141_557_760
    assert step_transfer_bytes(PUBLISHED_DEV, 18, "compute", 2) == (7 * double + 18 * single, 9 * double + 16 * single)
    assert step_transfer_bytes(PUBLISHED_DEV, 1, "compute", 2) == (0, 0)
    assert step_transfer_bytes(PUBLISHED_DEV, 0, "compute", 2) == (0, 0)


def test_swapping_more_never_makes_a_step_faster_and_hides_behind_large_pictures() -> None:
    def seconds(side: int, swap: int, options: Options) -> float:
        rates = rates_for(24 * GIB)
        return step_time(
            PUBLISHED_DEV, options, width=side, height=side, batch_size=1, blocks_to_swap=swap, rates=rates
        ).seconds

    options = usual_options()
    assert all(a <= b for a, b in itertools.pairwise(seconds(256, swap, options) for swap in range(39)))
    assert seconds(1024, 38, options) == seconds(1024, 0, options)
    assert seconds(256, 38, options) > seconds(256, 0, options)
