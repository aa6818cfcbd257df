"""The Library page in a browser: a finished LoRA is found, tried at several strengths, worked on, deleted and taken back."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Page, expect
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.lora.random_lora import random_lora
from tests.runs.in_process import answer
from tests.tiny import TinyModels
from tests.web.axe import EXCEPT_MESSAGES, serious_faults_in_both_schemes
from tests.web.page_process import App, visit
from tests.web.screenshots import shoot
from tests.web.test_presets_page import choose
from trainer.schema.run_folder import RunFolder
from trainer.train.checkpoint import save_lora

pytestmark = [pytest.mark.web, pytest.mark.timeout(300)]

LAYERS = ("lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_single_blocks_1_linear2")
PROMPT = "kelvo on a wall --w 64 --h 64 --s 2 --d 5"
DONE_MS = 120_000


@pytest.fixture
def run(app: App, tiny_models: TinyModels) -> RunFolder:
    """A finished run with two checkpoints, as a training on the tiny models leaves it."""
    with safe_open(tiny_models.flux_dev, "pt") as file:
        hidden = file.get_slice("img_in.weight").get_shape()[0]
    words = [word.removeprefix("--").split("=", 1) for word in tiny_models.arguments()]
    config = "".join(f'{name} = "{value}"\n' for name, value in words)
    run = RunFolder.create(
        app.home / "runs",
        "emblem",
        config_toml=config + 'mixed_precision = "no"\ndevice = "cpu"\n',
        dataset_toml='[[datasets]]\n[[datasets.subsets]]\ncaption_prefix = "kelvo, "\n',
        sample_prompts=f"{PROMPT}\n",
        info={"request": None},
    )
    metadata = {"ss_network_alpha": "4", "ss_sd_model_name": tiny_models.flux_dev.name, "ss_learning_rate": "0.0001"}
    for seed, name in enumerate(("emblem-000001", "emblem")):
        state = random_lora(hidden=hidden, names=LAYERS, alpha=4.0, seed=seed)
        save_lora(run.checkpoints_dir / f"{name}.safetensors", state, metadata)
    Image.new("RGB", (64, 64), "teal").save(run.samples_dir / "emblem_000001_00.png")
    return run


def pixels(page: Page, address: str) -> bytes:
    return Image.open(io.BytesIO(page.request.get(address).body())).convert("RGB").tobytes()


def test_a_strength_grid_of_a_finished_lora_where_0_is_the_base(
    app: App, page: Page, run: RunFolder, tiny_models: TinyModels, tmp_path: Path
) -> None:
    visit(page, app, "?tab=library")
    card = page.locator("#library-cards .lora-card")
    expect(card).to_have_count(1)
    expect(card).to_contain_text("kelvo")
    card.focus()
    page.keyboard.press("Enter")
    expect(page.locator("#library-facts h2")).to_have_text("emblem")
    expect(page).to_have_url(re.compile("lora=[0-9a-f]{16}"))
    expect(page.locator("#library-facts dl")).to_contain_text("4")
    # Models and prompt come from the run.
    expect(page.locator("#try-prompts textarea")).to_have_value(PROMPT)

    page.locator("#try-checkpoints input").click()
    page.get_by_role("option", name="emblem-000001").click()
    page.keyboard.press("Escape")
    page.locator("#try-make").click()
    # Two checkpoints by four strengths; strength 0 is made once and shown in both rows.
    expect(page.locator("#try-grid img")).to_have_count(8, timeout=DONE_MS)
    expect(page.locator("#try-progress .good")).to_be_visible()
    expect(page.locator("#try-grid th").first).to_have_text("0 (base model)")
    addresses = [str(image.get_attribute("src")) for image in page.locator("#try-grid img").all()]
    pictures = [pixels(page, f"{app.url.rstrip('/')}{address}") for address in addresses]
    done = answer(
        "generate", *tiny_models.arguments(), "--mixed_precision=no", "--device=cpu", f"--prompt={PROMPT}",
        f"--output_dir={tmp_path}",
    )  # fmt: skip
    assert done.code == 0, done.output
    (base,) = tmp_path.glob("*.png")
    assert pictures[0] == pictures[4] == Image.open(base).convert("RGB").tobytes()
    assert len(set(pictures)) == 7
    assert serious_faults_in_both_schemes(page, EXCEPT_MESSAGES) == []
    shoot(page, "story-15-strength-grid", tmp_path)

    # A reload shows the same, from the job's folder.
    visit(page)
    expect(page.locator("#try-grid img")).to_have_count(8)

    # A tool writes a new file, which appears as a card of its own.
    choose(page, "tool-kind", "Resize: a smaller rank")
    page.locator("#tool-rank input, #tool-rank textarea").fill("2")
    page.locator("#tool-name input, #tool-name textarea").fill("small emblem")
    page.locator("#tool-run").click()
    expect(page.locator("#tool-result .tool-text")).to_contain_text("rank 2 to 2", timeout=DONE_MS)
    expect(card).to_have_count(2)
    shoot(page, "library-tool", tmp_path)
    page.locator("#library-search input, #library-search textarea").fill("small")
    expect(card).to_have_count(1)
    expect(card).to_contain_text("rank 2")
    with page.expect_download() as download:
        page.locator("#library-facts a.download").click()
    assert download.value.suggested_filename == "emblem.safetensors"
    assert Path(download.value.path()).read_bytes() == (run.checkpoints_dir / "emblem.safetensors").read_bytes()

    # Another name, and the bin with its way back.
    card.click()
    expect(page.locator("#library-facts h2")).to_have_text("small_emblem")
    page.locator("#library-name input, #library-name textarea").fill("tiny emblem")
    page.locator("#library-rename").click()
    expect(page.locator("#library-facts h2")).to_have_text("tiny emblem")
    assert (app.home / "loras" / "tiny_emblem.safetensors").is_file()

    # A LoRA of two models, which needs no LoRA to begin with.
    state = load_file(tiny_models.flux_dev)
    state["double_blocks.0.img_attn.proj.weight"] += 1
    save_file(state, tmp_path / "tuned.safetensors")
    page.get_by_role("button", name="Make a LoRA of two models").click()
    expect(page.locator("#extract-start")).to_be_visible()
    extract = {"tuned": tmp_path / "none.safetensors", "rank": 2, "original": tiny_models.flux_dev}
    for name, value in extract.items():
        field = page.locator(f"#extract-{name} input, #extract-{name} textarea")
        expect(field).to_have_value("16" if name == "rank" else "")  # the fold is laid out when it opens
        field.fill(str(value))
        expect(field).to_have_value(str(value))
    page.locator("#extract-start").click()
    expect(page.get_by_text("Changed model file: there is no such file").first).to_be_visible()
    page.locator("#extract-tuned input, #extract-tuned textarea").fill(str(tmp_path / "tuned.safetensors"))
    page.locator("#extract-start").click()
    expect(page.locator("#extract-result .good")).to_be_visible(timeout=DONE_MS)
    page.locator("#library-search input, #library-search textarea").fill("")
    expect(card).to_have_count(3)
    assert (app.home / "loras" / "tuned-extract.safetensors").is_file()

    page.locator("#library-delete").click()
    page.locator("#library-delete-yes").click()
    expect(page.locator("#library-details")).to_be_hidden()
    assert not (app.home / "loras" / "tiny_emblem.safetensors").exists()
    page.locator("#library-undo").click()
    expect(page.locator("#library-facts h2")).to_have_text("tiny emblem")
    assert (app.home / "loras" / "tiny_emblem.safetensors").is_file()
