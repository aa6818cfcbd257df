"""The Dataset page in a real browser: captions that are edited, changed and undone, and the files on disk agree."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import pytest
from PIL import Image, ImageDraw
from playwright.sync_api import Locator, Page, expect

from tests.tools.tiny_captioners import make_tiny_florence
from tests.web.page_process import App, visit, wait_until
from tests.web.screenshots import shoot

pytestmark = [pytest.mark.web, pytest.mark.slow, pytest.mark.timeout(300)]

NUM_PICTURES = 26


def draw(path: Path, number: int, size: tuple[int, int] = (96, 64)) -> None:
    image = Image.new("RGB", size, (40 + 7 * number % 200, 90, 200 - 5 * number % 180))
    ImageDraw.Draw(image).ellipse((3 * number % 50, 5, 3 * number % 50 + 30, 40), fill=(250, 240, 9 * number % 250))
    image.save(path)


def make_dataset(app: App) -> Path:
    folder = app.home / "datasets" / "my-cat"
    folder.mkdir(parents=True)
    for number in range(NUM_PICTURES):
        draw(folder / f"{number:02d}.png", number)
        (folder / f"{number:02d}.txt").write_text(f"a red cat, {'sofa' if number % 2 else 'grass'}", encoding="utf-8")
    return folder


def captions(folder: Path) -> dict[str, str]:
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt"))}


def open_dataset(page: Page, app: App) -> None:
    visit(page, app, "?tab=dataset&dataset=my-cat")
    expect(page.locator(".picture-card").first).to_be_visible()


def text_box(page: Page, elem_id: str) -> Locator:
    return page.locator(f"#{elem_id}").locator("input, textarea").first


def in_place(page: Page, name: str) -> Locator:
    return page.locator(f'.picture-card[data-name="{name}"] textarea')


def test_captions_are_edited_replaced_and_undone_and_the_files_agree(app: App, page: Page, tmp_path: Path) -> None:
    folder = make_dataset(app)
    before = captions(folder)
    open_dataset(page, app)
    expect(page.locator(".picture-card")).to_have_count(24)
    expect(page.locator("#dataset-summary")).to_contain_text("26 pictures, 26 with captions")
    images = page.locator(".picture-card img")
    images.nth(3).scroll_into_view_if_needed()
    wait_until(lambda: bool(images.evaluate_all("all => all.slice(0, 4).every(i => i.naturalWidth > 0)")))

    # In the grid: leaving the box saves.
    in_place(page, "00.png").fill("a black cat, grass")
    in_place(page, "01.png").focus()
    expect(page.locator("#dataset-said")).to_contain_text("Saved the caption of 00.png")
    assert captions(folder) == {**before, "00": "a black cat, grass"}

    # Large: turning the page saves, by button and by key.
    page.locator('button[data-open="02.png"]').click()
    caption = text_box(page, "picture-caption")
    expect(caption).to_have_value("a red cat, grass")
    caption.fill("a white cat, grass")
    page.locator("#picture-next").click()
    expect(page.locator("#picture-stage")).to_contain_text("03.png")
    expect(caption).to_have_value("a red cat, sofa")
    wait_until(lambda: captions(folder)["02"] == "a white cat, grass")
    page.locator("#picture-stage").click()
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#picture-stage")).to_contain_text("02.png")
    expect(caption).to_have_value("a white cat, grass")
    page.keyboard.press("Escape")
    expect(page.locator("#picture-large")).to_be_hidden()

    # Find and replace: what it will do is shown first, then all files have it, those of the next page too.
    text_box(page, "bulk-find").fill("red cat")
    text_box(page, "bulk-replace-with").fill("zwx dog")
    expect(page.locator("#bulk-preview")).to_contain_text("24 of 26 captions change")
    edited = captions(folder)
    page.locator("#bulk-replace").click()
    expect(page.locator("#dataset-said")).to_contain_text("24 captions changed")
    assert captions(folder) == {name: text.replace("red cat", "zwx dog") for name, text in edited.items()}
    expect(in_place(page, "05.png")).to_have_value("a zwx dog, sofa")

    shoot(page, "story-14-captions", tmp_path)

    # Undo, one change after the other, back to the first; it is still there after a reload.
    expect(page.locator("#dataset-undo")).to_contain_text('replace "red cat"')
    visit(page)
    expect(page.locator(".picture-card")).to_have_count(24)
    page.locator("#dataset-undo").click()
    expect(in_place(page, "05.png")).to_have_value("a red cat, sofa")
    assert captions(folder) == edited
    for name in ("02", "00"):
        expect(page.locator("#dataset-undo")).to_contain_text(f"caption of {name}.png")
        page.locator("#dataset-undo").click()
        expect(in_place(page, f"{name}.png")).to_have_value(before[name])
    expect(page.locator("#dataset-undo")).to_be_disabled()
    assert captions(folder) == before

    # A tag leaves the pictures with it; a selection narrows what changes; Delete goes to the bin and comes back.
    page.locator("#dataset-tags button", has_text="sofa").click()
    expect(page.locator(".picture-card")).to_have_count(13)
    for name in ("01.png", "03.png"):
        page.locator(f'input[data-pick="{name}"]').check()
    expect(page.locator("#bulk-target")).to_contain_text("2 selected")
    text_box(page, "bulk-text").fill("zwx")
    page.locator("#bulk-trigger").click()
    expect(page.locator("#dataset-said")).to_contain_text("2 captions changed")
    assert [name for name, text in captions(folder).items() if text.startswith("zwx, ")] == ["01", "03"]
    page.locator("#bulk-delete").click()
    expect(page.locator(".picture-card")).to_have_count(11)
    assert not {"01.png", "03.png", "01.txt", "03.txt"} & {path.name for path in folder.iterdir()}
    page.locator("#dataset-undo").click()
    expect(page.locator(".picture-card")).to_have_count(13)
    page.locator("#dataset-undo").click()
    expect(in_place(page, "03.png")).to_have_value("a red cat, sofa")
    assert captions(folder) == before

    # And on to training.
    page.locator("#dataset-use").click()
    expect(text_box(page, "field-image_dir")).to_have_value(str(folder))
    expect(page).to_have_url(re.compile("tab=train"))


def test_pictures_are_dropped_into_a_new_dataset(app: App, page: Page, tmp_path: Path) -> None:
    for number in range(3):
        draw(tmp_path / f"cat {number}.png", number)
    (tmp_path / "cat 0.txt").write_text("a cat", encoding="utf-8")
    (tmp_path / "bad.png").write_bytes((tmp_path / "cat 0.png").read_bytes()[:90])
    visit(page, app, "?tab=dataset")
    text_box(page, "dataset-new-name").fill("My cats")
    page.locator("#dataset-create").click()
    expect(page.locator("#dataset-said")).to_contain_text("My_cats is ready")
    expect(page).to_have_url(re.compile("dataset=My_cats"))
    files = sorted([*tmp_path.glob("*.png"), *tmp_path.glob("*.txt")])
    page.locator("#dataset-drop input[type=file]").set_input_files(files)
    expect(page.locator(".picture-card")).to_have_count(3)
    expect(page.locator("#dataset-said")).to_contain_text("3 pictures and 1 captions were taken in")
    expect(page.locator("#dataset-said")).to_contain_text("bad.png")
    folder = app.home / "datasets" / "My_cats"
    assert sorted(path.name for path in folder.iterdir()) == ["cat_0.png", "cat_0.txt", "cat_1.png", "cat_2.png"]
    with page.expect_download() as waiting:
        page.locator("#dataset-zip").click()
    waiting.value.save_as(tmp_path / "cats.zip")
    with zipfile.ZipFile(tmp_path / "cats.zip") as archive:
        assert sorted(archive.namelist()) == ["cat_0.png", "cat_0.txt", "cat_1.png", "cat_2.png"]
        assert archive.read("cat_0.txt") == b"a cat"
    page.locator("#dataset-drop input[type=file]").set_input_files([tmp_path / "cats.zip"])
    expect(page.locator(".picture-card")).to_have_count(6)
    assert (folder / "cat_0-2.txt").read_text(encoding="utf-8") == "a cat"
    text_box(page, "dataset-new-path").fill("/etc")
    page.locator("#dataset-add").click()
    expect(page.get_by_text("this folder may not be used by the page").first).to_be_visible()


def test_a_broken_picture_and_a_missing_caption_are_named_and_fixed_on_the_spot(
    app: App, page: Page, tmp_path: Path
) -> None:
    folder = app.home / "datasets" / "cats"
    folder.mkdir(parents=True)
    for number in range(4):
        draw(folder / f"{number}.png", 9 * number, (600, 500 - 40 * number))
        (folder / f"{number}.txt").write_text("a cat", encoding="utf-8")
    (folder / "2.txt").unlink()
    broken = (folder / "3.png").read_bytes()
    (folder / "3.png").write_bytes(broken[: len(broken) // 2])
    visit(page, app)
    expect(text_box(page, "field-resolution")).not_to_have_value("")
    text_box(page, "field-image_dir").fill(str(folder))
    expect(page.locator("#pictures .bad")).to_contain_text("3.png")
    expect(page.locator("#pictures .warn")).to_contain_text("2.png")

    page.locator("#look-after-pictures").click()
    expect(page).to_have_url(re.compile("tab=dataset.*dataset=cats"))
    missing = page.locator('#doctor-report [data-kind="missing"]')
    expect(missing).to_contain_text("2.png")
    expect(page.locator('#doctor-report [data-kind="corrupt"]')).to_contain_text("3.png")
    expect(page.locator("#doctor-buckets")).to_contain_text("576 x 448")
    shoot(page, "story-03-doctor", tmp_path)
    caption = missing.locator("textarea")
    caption.fill("a cat on a wall")
    page.locator('#doctor-report button[data-remove="3.png"]').click()
    expect(page.locator(".picture-card")).to_have_count(3)
    wait_until(lambda: (folder / "2.txt").exists())
    assert (folder / "2.txt").read_text(encoding="utf-8") == "a cat on a wall"
    assert not (folder / "3.png").exists()
    page.locator("#doctor-check").click()
    expect(page.locator("#doctor-report [data-kind]")).not_to_have_count(0)
    expect(page.locator('#doctor-report [data-kind="missing"], #doctor-report [data-kind="corrupt"]')).to_have_count(0)

    # What training cuts off lies on the large picture.
    page.locator('.picture-card button[data-open="0.png"]').click()
    expect(page.locator("#picture-stage .kept")).to_be_attached()
    expect(page.locator("#picture-crop")).to_contain_text("Trained at 576 x 448")

    page.locator("#dataset-use").click()
    expect(page.locator("#pictures")).to_contain_text("3 pictures")
    expect(page.locator("#pictures .bad")).to_have_count(0)


def test_captions_are_written_by_a_worker_and_undone(app: App, page: Page, tmp_path: Path) -> None:
    folder = app.home / "datasets" / "cats"
    folder.mkdir(parents=True)
    for number in range(3):
        draw(folder / f"{number}.png", 9 * number)
    model = make_tiny_florence(tmp_path / "model")
    visit(page, app, "?tab=dataset&dataset=cats")
    page.get_by_text("Automatic captions", exact=True).click()
    text_box(page, "caption-model").fill(str(tmp_path / "nothing"))
    page.locator("#caption-start").click()
    expect(page.locator("#caption-status .bad")).to_contain_text("cannot be loaded")
    text_box(page, "caption-model").fill(str(model))
    page.locator("#caption-selected input").check()
    page.locator("#caption-start").click()
    expect(page.get_by_text("no picture is selected").first).to_be_visible()
    for name in ("0.png", "1.png"):
        page.locator(f'input[data-pick="{name}"]').check()
    expect(page.locator("#bulk-target")).to_contain_text("2 selected")
    page.locator("#caption-start").click()
    expect(page.locator("#caption-status .good")).to_contain_text("2 captions written")
    expect(in_place(page, "1.png")).not_to_have_value("")
    assert sorted(captions(folder)) == ["0", "1"]
    expect(page.locator("#dataset-undo")).to_contain_text("automatic captions")
    page.locator("#dataset-undo").click()
    expect(in_place(page, "1.png")).to_have_value("")
    assert captions(folder) == {}


def test_masks_and_repeats_are_set_shown_and_go_into_training(app: App, page: Page, tmp_path: Path) -> None:
    folder = app.home / "datasets" / "cats"
    folder.mkdir(parents=True)
    for number in range(3):
        draw(folder / f"{number}.png", 9 * number)
    Image.new("L", (96, 64), 0).save(tmp_path / "1_mask.png")
    Image.new("L", (96, 64), 0).save(tmp_path / "dog.png")
    visit(page, app, "?tab=dataset&dataset=cats")
    page.locator('input[data-pick="1.png"]').check()
    expect(page.locator("#bulk-target")).to_contain_text("1 selected")
    page.locator("#dataset-repeats").get_by_role("button", name="Repeats").first.click()
    text_box(page, "repeats-times").fill("3")
    page.locator("#repeats-set").click()
    card = page.locator('.picture-card[data-name="1.png"]')
    expect(card.locator(".often")).to_have_text("×3")
    text_box(page, "repeats-folder").fill("4")
    page.locator("#repeats-set-folder").click()
    expect(page.locator("#dataset-said")).to_contain_text("repeated 4 times")

    page.locator("#dataset-masks").get_by_role("button", name="Masks").first.click()
    expect(page.locator("#masks-state")).to_contain_text("No masks.")
    page.locator("#masks-drop input[type=file]").set_input_files([tmp_path / "1_mask.png", tmp_path / "dog.png"])
    expect(page.locator("#dataset-said")).to_contain_text("dog.png: there is no picture of this name")
    expect(page.locator("#masks-state")).to_contain_text("1 of 3 pictures")
    mask = card.locator("img.mask")
    mask.scroll_into_view_if_needed()
    wait_until(lambda: bool(mask.evaluate("i => i.naturalWidth > 0")))
    page.locator("#masks-white").click()
    expect(page.locator("#masks-state")).to_contain_text("Each of the 3")
    shoot(page, "masks-and-repeats", tmp_path)
    page.locator('button[data-open="1.png"]').click()
    expect(page.locator("#picture-mask")).to_be_visible()
    over = page.locator("#picture-stage img.mask-over")
    wait_until(lambda: bool(over.evaluate("i => i.naturalWidth > 0")))
    page.locator("#picture-close").click()

    page.locator("#dataset-use").click()
    expect(text_box(page, "field-num_repeats")).to_have_value("4")
    page.get_by_text("Files and command line", exact=True).click()
    preview = page.locator("#preview-dataset textarea")
    expect(preview).to_have_value(re.compile("conditioning_data_dir"))
    expect(preview).to_have_value(re.compile(r'picture_repeats[^\n]*\s*"?1\.png"? = 3'))
