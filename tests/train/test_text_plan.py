"""Caption rules with text that is encoded beforehand: what is planned, encoded, kept and trained on."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import CLIPTextModel, T5EncoderModel

from tests.tiny import TinyModels, make_tiny_dataset
from tests.train.test_auto_swap import Card, Notes
from trainer.__main__ import main
from trainer.data.batches import epoch_batches
from trainer.data.cache_files import CACHE_FOLDER
from trainer.schema.cli import parse_command_line
from trainer.schema.events import EventReader, EventWriter
from trainer.schema.memory import TextPlace
from trainer.schema.model_kinds import format_bytes
from trainer.train import text_phase
from trainer.train.check import CheckedRun, check_run
from trainer.train.engine import Engine
from trainer.train.recipe import train
from trainer.train.reporting import Reporter
from trainer.train.text_phase import prepare_text
from trainer.train.text_plan import caption_course, plan_texts

EVERY_RULE = (
    "--caption_prefix=new",
    "--caption_suffix=end",
    "--enable_wildcard",
    "--shuffle_caption",
    "--keep_tokens=1",
    "--caption_tag_dropout_rate=0.2",
    "--caption_dropout_rate=0.2",
    "--caption_dropout_every_n_epochs=3",
    "--token_warmup_step=0.5",
    "--secondary_separator=;",
)


def words(models: TinyModels, folder: Path, *more: str) -> list[str]:
    dataset = make_tiny_dataset(folder, count=3)
    for number, path in enumerate(sorted((folder / "images").glob("*.txt"))):
        path.write_text(f"thing {number}, {{red|blue}}, a; b, c\nother {number}, d, e\n", encoding="utf-8")
    return [
        *models.arguments(),
        f"--dataset_config={dataset}",
        f"--output_dir={folder / 'out'}",
        "--device=cpu",
        "--seed=5",
        "--network_dim=4",
        "--network_train_unet_only",
        "--cache_latents",
        "--cache_text_encoder_outputs",
        "--t5xxl_max_token_length=48",
        "--max_train_epochs=4",
        *more,
    ]


def checked_run(models: TinyModels, folder: Path, *more: str) -> CheckedRun:
    return check_run(parse_command_line(words(models, folder, *more)), Reporter(is_main=False))


@pytest.mark.parametrize(("mask", "precision"), [((), "no"), (("--apply_t5_attn_mask",), "bf16")])
def test_the_plan_says_exactly_what_is_encoded_and_how_large_it_is(
    tiny_models: TinyModels, tmp_path: Path, mask: tuple[str, ...], precision: str
) -> None:
    more = (*EVERY_RULE, *mask, f"--mixed_precision={precision}", "--cache_text_encoder_outputs_to_disk")
    checked = checked_run(tiny_models, tmp_path, *more)
    plan = plan_texts(checked, seed=5)
    assert plan is not None
    assert plan.num_captions == 3
    # 3 captions of 8 texts at most and the empty one; 12 draws of a warm-up of 6 steps may add one each
    assert 3 * 6 <= len(plan.texts) <= 3 * 8 + 1 + 6
    prepare_text(checked, plan, Engine.start(checked.options), Reporter(is_main=False))
    files = sorted((tmp_path / "images" / CACHE_FOLDER).glob("text-*"))
    assert len(files) == len(plan.texts)
    kept_bytes, dtypes, lengths = 0, set[torch.dtype](), set[int]()
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no mapping
                tensor = tensors.get_tensor(name)
                kept_bytes += tensor.nbytes
                dtypes.add(tensor.dtype)
                if name == "txt":
                    lengths.add(len(tensor))
    assert kept_bytes == plan.num_bytes
    assert dtypes == {torch.float32 if precision == "no" else torch.bfloat16}
    # Without the mask the transformer sees the padding too, and T5's outputs there are not zero.
    assert (lengths == {48}) != bool(mask)
    assert str(plan) == (
        f"{len(files)} texts of 3 captions and the prompts are encoded beforehand, {format_bytes(kept_bytes)}"
    )


@pytest.mark.parametrize("mask", [(), ("--apply_t5_attn_mask",)])
def test_every_rule_trains_on_cached_text_as_on_live_text(
    tiny_models: TinyModels, tmp_path: Path, mask: tuple[str, ...]
) -> None:
    checked = checked_run(tiny_models, tmp_path, *EVERY_RULE, *mask)
    engine, reporter = Engine.start(checked.options), Reporter(is_main=False)
    cached = prepare_text(checked, plan_texts(checked, seed=5), engine, reporter).source
    live = prepare_text(checked, None, engine, reporter).source
    course = caption_course(checked.options, checked.schedule, 1)
    captions = [
        planned.caption
        for epoch in range(1, 5)
        for plan in epoch_batches(checked.index, 5, epoch, course=course)
        for planned in plan.items
    ]
    assert captions[6:9] == ["", "", ""], "the third epoch is without captions"
    assert len(set(captions)) > 6
    assert not any("{" in caption or ";" in caption for caption in captions)
    with torch.no_grad():
        for pair in (captions[:2], captions[4:7], captions[-2:]):
            ours, theirs = cached(pair), live(pair)
            torch.testing.assert_close(ours.vec, theirs.vec, atol=1e-5, rtol=1e-5)
            shown = torch.ones(ours.txt.shape[:2], dtype=torch.bool)
            if ours.mask is not None and theirs.mask is not None:
                assert torch.equal(ours.mask, theirs.mask)
                shown = ours.mask.bool()
            torch.testing.assert_close(ours.txt[shown], theirs.txt[shown], atol=1e-5, rtol=1e-5)
            assert (ours.mask is None) == (theirs.mask is None)


def test_live_text_has_no_limit_of_variants(tiny_models: TinyModels, tmp_path: Path) -> None:
    arguments = words(tiny_models, tmp_path, "--shuffle_caption", "--caption_variants=2")
    command = parse_command_line([word for word in arguments if word != "--cache_text_encoder_outputs"])
    assert any(note.startswith("caption_variants has no effect") for note in command.notes)
    checked = check_run(command, Reporter(is_main=False))
    assert plan_texts(checked, seed=5) is None
    assert caption_course(checked.options, checked.schedule, 1).num_variants is None


def test_a_run_says_it_in_its_plan_and_so_does_check(
    tiny_models: TinyModels, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = words(tiny_models, tmp_path, *EVERY_RULE, "--max_train_steps=2", "--caption_variants=2")
    arguments.remove("--max_train_epochs=4")
    events = tmp_path / "events.jsonl"
    train(parse_command_line(arguments), Reporter(events=EventWriter(events, 1)))
    plan = next(event for event in EventReader(events).read_new() if event["kind"] == "plan")
    # 3 captions twice, the empty one, and what the one step of warm-up adds
    assert plan["num_texts"] in (7, 8)
    assert isinstance(plan["text_bytes"], int)
    capsys.readouterr()
    assert main(["check", *arguments]) == 0
    printed = capsys.readouterr()
    assert f"{plan['num_texts']} texts of 3 captions" in printed.out + printed.err


def test_check_says_which_network_settings_are_about_no_layer(
    tiny_models: TinyModels, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expressions = "network_reg_dims=single_blocks_99=2,te1_=3"
    arguments = words(tiny_models, tmp_path, "--network_args", expressions)
    assert main(["check", *arguments]) == 0
    printed = capsys.readouterr()
    line = "network_reg_dims has no effect with {}: no layer that is trained here has such a name"
    assert line.format("single_blocks_99, te1_") in printed.out + printed.err
    # With CLIP-L trained, its layers do have such a name.
    arguments.remove("--network_train_unet_only")
    arguments.remove("--cache_text_encoder_outputs")
    assert main(["check", *arguments]) == 0
    printed = capsys.readouterr()
    assert line.format("single_blocks_99") in printed.out + printed.err


def num_encoders() -> int:
    gc.collect()
    return sum(type(one) in (T5EncoderModel, CLIPTextModel) for one in gc.get_objects())


@pytest.mark.parametrize("place", ["device", "streamed", "host"])
def test_text_encoders_are_encoded_with_where_there_is_room_and_gone_afterwards(
    tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: TextPlace
) -> None:
    checked = checked_run(tiny_models, tmp_path, *EVERY_RULE)
    # The tiny T5 has no more layers than there are slots: no card is too small for it and large enough for its layers.
    monkeypatch.setattr(text_phase, "text_place", lambda *_sizes, **_more: place)
    plan = plan_texts(checked, seed=5)
    assert plan is not None
    reporter = Notes()
    usual, before = Engine.start(checked.options), num_encoders()
    card = Card(usual.device, usual.dtype, 0, 1, usual.reduce_mean, total=1)
    found = prepare_text(checked, plan, card, reporter)
    said = [line for line in reporter.lines if "too large for this card" in line]
    assert [("in turn" in line or "one after the other" in line) for line in said] == {
        "device": [],
        "streamed": [True],
        "host": [False],
    }[place]
    assert num_encoders() == before
    expected = prepare_text(checked, plan, usual, Reporter(is_main=False))
    for text in plan.texts:
        a, b = found.source([text]), expected.source([text])
        torch.testing.assert_close(a.txt, b.txt)
        torch.testing.assert_close(a.vec, b.vec)
