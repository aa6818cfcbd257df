"""The page in a real browser, with the real trainer behind it."""

from __future__ import annotations

import http.client
import re
from pathlib import Path

import psutil
import pytest
from playwright.sync_api import Locator, Page, expect

from tests.fluxgui.sparse_flux import make_sparse_flux
from tests.tiny import TinyModels
from tests.web.page_process import ROOT, App, visit, wait_until
from tests.web.screenshots import shoot
from trainer.tools.tiny_pictures import make_images

pytestmark = [pytest.mark.web, pytest.mark.slow, pytest.mark.timeout(1200)]


def box(page: Page, name: str) -> Locator:
    return page.locator(f"#field-{name}").locator("input, textarea").first


def choose(page: Page, dropdown: str, text: str) -> None:
    page.locator(f"{dropdown} input").click()
    page.get_by_role("option", name=text, exact=True).click()
    # gradio's list fades out, and fails when its choices become fewer meanwhile.
    expect(page.get_by_role("option")).to_have_count(0)


def use_demo_files(page: Page, app: App) -> None:
    visit(page, app)
    page.locator("#use-demo").click()
    expect(box(page, "output_name")).to_have_value("demo")
    expect(page.locator("#problems .good")).to_be_visible()


def test_a_preset_is_the_same_after_a_restart(app: App, page: Page) -> None:
    values = {"network_dim": "24", "network_alpha": "12", "learning_rate": "0.00035", "resolution": "384", "seed": "7"}
    visit(page, app)
    expect(box(page, "network_dim")).not_to_have_value("")
    for name, value in values.items():
        if name != "seed":
            box(page, name).fill(value)
    page.get_by_text("More settings", exact=True).click()
    box(page, "seed").fill("7")
    page.locator("#field-flip_aug input").check()
    page.get_by_text("My presets", exact=True).click()
    page.locator("#preset-name input, #preset-name textarea").fill("My cat")
    page.locator("#preset-save").click()
    expect(page.locator("#preset-own input")).to_have_value("My cat")
    for name in values:
        box(page, name).fill("1")
    page.locator("#field-flip_aug input").uncheck()

    page.goto("about:blank")
    app.kill()
    app.start()
    visit(page, app)
    page.get_by_text("More settings", exact=True).click()
    page.get_by_text("My presets", exact=True).click()
    choose(page, "#preset-own", "My cat")
    page.locator("#preset-load").click()
    for name, value in values.items():
        expect(box(page, name)).to_have_value(value)
    expect(page.locator("#field-flip_aug input")).to_be_checked()

    # Replacing and deleting ask first, and then do what was asked, whatever is chosen by then.
    name = page.locator("#preset-name input, #preset-name textarea")
    page.locator("#preset-delete").click()
    expect(page.locator("#preset-delete-question")).to_contain_text("Delete the preset My cat?")
    name.fill("My dog")
    page.locator("#preset-save").click()
    expect(page.locator("#preset-own input")).to_have_value("My dog")
    page.locator("#preset-delete-yes").click()
    wait_until(lambda: [file.stem for file in (app.home / "presets").glob("*.toml")] == ["My dog"])
    expect(page.locator("#preset-delete-question")).to_be_hidden()
    name.fill("My dog")
    page.locator("#preset-save").click()
    expect(page.locator("#preset-replace-question")).to_contain_text("Replace the preset My dog?")
    name.fill("My fox")
    page.locator("#preset-replace-yes").click()
    expect(page.locator("#preset-replace-question")).to_be_hidden()
    expect(page.locator("#preset-own input")).to_have_value("My dog")
    page.locator("#preset-delete").click()
    expect(page.locator("#preset-delete-question")).to_contain_text("Delete the preset My dog?")
    page.locator("#preset-delete-yes").click()
    expect(page.locator("#preset-own input")).to_have_value("")
    wait_until(lambda: not list((app.home / "presets").glob("*.toml")))


def test_the_estimate_picks_more_blocks_for_less_memory(app: App, page: Page) -> None:
    flux = make_sparse_flux(app.home / "models" / "flux1-dev.safetensors")
    visit(page, app)
    expect(box(page, "network_dim")).not_to_have_value("")
    page.locator("#find-models").click()
    expect(box(page, "pretrained_model_name_or_path")).to_have_value(str(flux))
    expect(page.locator("#field-pretrained_model_name_or_path")).to_contain_text("FLUX.1 dev")
    choose(page, "#preset-vram", "24 GB")
    picked: list[int] = []
    for gigabytes in (24, 16, 12):
        page.locator("#vram-gb input").fill(str(gigabytes))
        page.locator("#estimate").click()
        expect(page.locator("#estimate-result .box")).to_contain_text(f"of {gigabytes}.0 GiB")
        picked.append(int(box(page, "blocks_to_swap").input_value()))
    assert picked == sorted(set(picked)), "less memory takes more blocks"
    page.wait_for_timeout(500)
    expect(page.locator("#estimate-is-old")).to_be_empty()
    box(page, "network_dim").fill("64")
    expect(page.locator("#estimate-is-old")).to_contain_text("changed since")
    page.locator("#estimate").click()
    expect(page.locator("#estimate-is-old")).to_be_empty()
    picked.append(int(box(page, "blocks_to_swap").input_value()))
    expect(page.locator("#estimate-result .memory-legend").first).to_contain_text("Weights")
    page.get_by_text("Files and command line", exact=True).click()
    expect(page.locator("#preview-config textarea")).to_have_value(re.compile(f"blocks_to_swap = {picked[-1]}"))


def test_errors_stand_at_their_fields_in_plain_words(
    app: App, page: Page, tiny_models: TinyModels, tmp_path: Path
) -> None:
    visit(page, app)
    expect(box(page, "network_dim")).not_to_have_value("")
    page.locator("#start").click()
    for name in ("pretrained_model_name_or_path", "t5xxl", "clip_l", "ae", "image_dir"):
        expect(page.locator(f"#field-{name}")).to_contain_text("Needed")
    box(page, "pretrained_model_name_or_path").fill("/nowhere/flux.safetensors")
    expect(page.locator("#field-pretrained_model_name_or_path")).to_contain_text("does not exist")
    box(page, "t5xxl").fill(str(tiny_models.clip_l))
    expect(page.locator("#field-t5xxl")).to_contain_text("This is a CLIP text encoder")
    box(page, "network_dim").fill("0")
    expect(page.locator("#field-network_dim")).to_contain_text("1024")
    box(page, "learning_rate").fill("fast")
    expect(page.locator("#field-learning_rate.field-bad")).to_contain_text("fast")
    expect(page.locator("#problems")).to_contain_text("Learning rate")
    shoot(page, "story-04-wrong-file", tmp_path)
    box(page, "network_dim").fill("16")
    expect(page.locator("#field-network_dim.field-bad")).to_have_count(0)

    # Also in a part of the form that was closed.
    page.get_by_text("More settings", exact=True).click()
    box(page, "seed").fill("-1")
    expect(page.locator("#field-seed.field-bad")).to_be_visible()
    page.get_by_text("More settings", exact=True).click()
    expect(page.locator("#field-seed")).to_be_hidden()
    visit(page)
    expect(page.locator("#field-seed.field-bad")).to_be_visible()
    assert app.runs() == []
    assert "Traceback" not in (page.text_content("body") or "")


def test_a_form_is_kept_over_a_reload(app: App, page: Page) -> None:
    visit(page, app)
    expect(box(page, "network_dim")).not_to_have_value("")
    page.get_by_text("Files and command line", exact=True).click()
    box(page, "output_name").fill("my dog")
    box(page, "network_dim").fill("48")
    expect(page.locator("#preview-config textarea")).to_have_value(re.compile("network_dim = 48"))
    page.wait_for_timeout(500)
    visit(page)
    expect(box(page, "network_dim")).to_have_value("48")
    expect(box(page, "output_name")).to_have_value("my dog")


def test_no_file_is_served_that_a_run_does_not_name(app: App) -> None:
    secret = app.home / "models" / "secret.txt"
    secret.parent.mkdir(parents=True)
    secret.write_text("secret")
    run = app.home / "runs" / "20260101-000000-x"
    run.mkdir(parents=True)
    (run / "run.json").write_text("{}")
    (run / "events.jsonl").write_text("")
    (run / "config.toml").write_text("")
    paths = (
        f"gradio_api/file={secret}",
        f"gradio_api/file={ROOT / 'app.py'}",
        "gradio_api/file=app.py",
        "gradio_api/file=/etc/passwd",
        f"gradio_api/file={run / 'config.toml'}",
        f"files/{run.name}/config/config.toml",
        f"files/{run.name}/samples/..%2Fconfig.toml",
        f"files/{run.name}/log/run.json",
        "files/..%2Fmodels/log/secret.txt",
    )
    answers: dict[str, int] = {}
    for path in paths:
        connection = http.client.HTTPConnection("127.0.0.1", app.port, timeout=10)
        connection.request("GET", f"/{path}")
        answers[path] = connection.getresponse().status
        connection.close()
    assert {path: status for path, status in answers.items() if status not in (403, 404)} == {}


def test_the_page_can_be_used_soon_after_its_start(app: App, page: Page) -> None:
    """Five seconds are the aim on two free cores. The page's own work is bound: how long it waits for a busy machine is not."""
    app.kill()
    app.start()
    visit(page, app)
    expect(box(page, "network_dim")).not_to_have_value("")
    spent = psutil.Process(app.processes[-1].pid).cpu_times()
    assert spent.user + spent.system < 10


def test_dropped_pictures_a_trigger_and_two_presets_start_a_run_whose_page_opens(
    app: App, page: Page, tmp_path: Path
) -> None:
    use_demo_files(page, app)
    box(page, "image_dir").fill("")
    make_images(tmp_path / "cats", 10)
    (tmp_path / "cats" / "broken.png").write_bytes(b"no picture")
    box(page, "output_name").fill("mycat")
    page.locator("#drop-pictures input[type=file]").set_input_files(sorted((tmp_path / "cats").iterdir()))
    folder = app.home / "datasets" / "mycat"
    expect(box(page, "image_dir")).to_have_value(str(folder))
    expect(page.locator("#upload-result")).to_contain_text("broken.png")
    expect(page.locator("#pictures")).to_contain_text("10 pictures, all with captions")
    expect(page.locator("#pictures img")).to_have_count(10)
    assert len(list(folder.glob("*.txt"))) == 10
    assert not (folder / "broken.png").exists()
    box(page, "trigger_word").fill("zwx")
    page.locator("#preset-purpose label", has_text="Object").click()
    choose(page, "#preset-vram", "24 GB")
    # Presets are made for the published models.
    box(page, "resolution").fill("64")
    box(page, "max_train_epochs").fill("500")

    # A picture that broke meanwhile is named, and keeps the run from starting.
    (folder / "late.png").write_bytes(b"no picture")
    page.locator("#start").click()
    expect(page.locator("#field-image_dir.field-bad")).to_contain_text("late.png")
    expect(page.locator("#problems")).to_contain_text("late.png")
    assert app.runs() == []
    (folder / "late.png").unlink()
    page.locator("#start").dblclick()
    expect(page).to_have_url(re.compile(r"tab=runs.*run=2"))
    expect(page.locator("#run-header h2")).to_have_text("mycat")
    (run,) = app.runs()  # a double click starts one run
    assert 'caption_prefix = "zwx"' in (run / "dataset.toml").read_text("utf-8")
    shoot(page, "story-02-started", tmp_path)
