from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from tests.data.specs import DATASET, SUBSET, one_dataset, picture
from trainer.data.decoding import EXIF_ORIENTATION
from trainer.data.index import index_dataset
from trainer.data.items import DatasetIndex
from trainer.schema.base import UserError
from trainer.schema.dataset_keys import DatasetConfig, SubsetSpec


def folder_with(folder: Path, *sizes: tuple[int, int], caption: str | None = "a cat") -> SubsetSpec:
    for number, (width, height) in enumerate(sizes):
        picture(folder / f"{number:03d}.png", width, height, seed=number, caption=caption)
    return replace(SUBSET, image_dir=folder)


def problems_of(config: DatasetConfig) -> list[str]:
    with pytest.raises(UserError) as failure:
        index_dataset(config)
    assert failure.value.exit_code == 3
    return [str(problem) for problem in failure.value.problems]


def captions_of(index: DatasetIndex) -> dict[str, str]:
    return {item.path.name: item.caption for item in index.items}


def test_items_have_sizes_buckets_captions_and_repeats(tmp_path: Path) -> None:
    subset = replace(folder_with(tmp_path, (64, 64), (128, 64), (60, 120)), num_repeats=3)
    index = index_dataset(one_dataset(subset, like=replace(DATASET, batch_size=2)))
    assert [(item.width, item.height, item.bucket) for item in index.items] == [
        (64, 64, (64, 64)),
        (128, 64, (80, 48)),
        (60, 120, (48, 80)),
    ]
    assert {item.num_repeats for item in index.items} == {3}
    assert index.num_images == 3
    assert index.num_batches_per_epoch == 6
    (dataset,) = index.datasets
    assert dict(dataset.bucket_counts) == {(48, 80): 3, (64, 64): 3, (80, 48): 3}
    assert (dataset.num_train_images, dataset.num_reg_images) == (9, 0)
    assert dataset.mean_aspect_error == pytest.approx((abs(80 / 48 - 2) + abs(48 / 80 - 0.5)) / 3)
    assert dataset.subsets[0].tag_frequency == {"a cat": 3}
    assert index.warnings == ()


def test_a_turned_photo_is_measured_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 8
    Image.new("RGB", (120, 60)).save(tmp_path / "a.jpg", exif=exif)
    (item,) = index_dataset(one_dataset(replace(SUBSET, image_dir=tmp_path, class_tokens="x"))).items
    assert (item.width, item.height, item.bucket) == (60, 120, (48, 80))


def test_without_buckets_every_picture_gets_the_resolution(tmp_path: Path) -> None:
    subset = folder_with(tmp_path, (300, 100), (20, 90))
    index = index_dataset(one_dataset(subset, like=replace(DATASET, enable_bucket=False, resolution=(64, 48))))
    assert [item.fit.bucket for item in index.items] == [(64, 48), (64, 48)]
    assert [item.fit.resized for item in index.items] == [(144, 48), (64, 288)]


def test_files_are_taken_by_ending_in_any_case_sorted_and_not_from_folders_inside(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.jpg", "c.WebP", "d.bmp", "inside/e.png", ".hidden.png"):
        picture(tmp_path / name)
    (tmp_path / "notes.md").write_text("no picture")
    subset = replace(SUBSET, image_dir=tmp_path, class_tokens="cat")
    assert [item.path.name for item in index_dataset(one_dataset(subset)).items] == [
        "a.jpg",
        "b.PNG",
        "c.WebP",
        "d.bmp",
    ]


def test_pictures_of_formats_that_are_not_read_are_reported(tmp_path: Path) -> None:
    subset = folder_with(tmp_path, (64, 64))
    Image.new("RGB", (8, 8)).save(tmp_path / "moving.gif")
    index = index_dataset(one_dataset(subset))
    assert index.warnings == (f"{tmp_path}: 1 pictures of other formats are left out: moving.gif",)


def test_only_the_first_line_of_a_caption_is_used_and_more_lines_are_reported(tmp_path: Path) -> None:
    subset = folder_with(tmp_path, (64, 64), (64, 64))
    (tmp_path / "000.txt").write_text("  a red cat \nsecond line\n", encoding="utf-8")
    index = index_dataset(one_dataset(subset))
    assert captions_of(index) == {"000.png": "a red cat", "001.png": "a cat"}
    assert index.warnings == ("1 caption files have several lines; the first one is used: 000.png",)


def test_a_byte_order_mark_is_not_part_of_the_caption(tmp_path: Path) -> None:
    subset = folder_with(tmp_path, (64, 64))
    (tmp_path / "000.txt").write_text("größe", encoding="utf-8-sig")
    assert captions_of(index_dataset(one_dataset(subset))) == {"000.png": "größe"}


def test_an_empty_caption_file_is_an_empty_caption_with_a_warning(tmp_path: Path) -> None:
    subset = replace(folder_with(tmp_path, (64, 64), caption=""), class_tokens="cat")
    index = index_dataset(one_dataset(subset))
    assert captions_of(index) == {"000.png": ""}
    assert index.warnings == ("1 caption files are empty: 000.png",)
    assert index.missing_captions == ()


def test_face_detection_names_find_the_caption_of_the_original(tmp_path: Path) -> None:
    picture(tmp_path / "my_cat_10_20_30_40.png")
    (tmp_path / "my_cat.txt").write_text("a face", encoding="utf-8")
    index = index_dataset(one_dataset(replace(SUBSET, image_dir=tmp_path)))
    assert captions_of(index) == {"my_cat_10_20_30_40.png": "a face"}


def test_missing_captions_give_one_warning_that_counts_and_names_them(tmp_path: Path) -> None:
    with_words = replace(folder_with(tmp_path / "a", *[(64, 64)] * 7, caption=None), class_tokens="my cat")
    without = folder_with(tmp_path / "b", (64, 64), caption=None)
    captioned = folder_with(tmp_path / "c", (64, 64))
    index = index_dataset(one_dataset(with_words, without, captioned))
    assert [item.caption for item in index.items] == ["my cat"] * 7 + ["", "a cat"]
    assert len(index.missing_captions) == 8
    assert index.warnings == (
        "8 of 9 pictures have no caption file (.txt) and train with their class tokens, or with an empty caption where "
        "there are none: 000.png, 001.png, 002.png, 003.png, 004.png and 3 more",
    )


def test_captions_with_another_ending_are_pointed_out(tmp_path: Path) -> None:
    subset = replace(folder_with(tmp_path, (64, 64)), caption_extension=".caption")
    (warning,) = index_dataset(one_dataset(subset)).warnings
    assert warning.endswith(". There is 000.txt, for one: is caption_extension right?")


def test_every_problem_is_reported_at_once(tmp_path: Path) -> None:
    cats = folder_with(tmp_path / "cats", *[(64, 64)] * 4)
    broken = tmp_path / "cats" / "003.png"
    broken.write_bytes(broken.read_bytes()[:300])
    (tmp_path / "cats" / "001.png").write_bytes(b"")
    (tmp_path / "cats" / "002.txt").write_bytes("größe".encode("latin-1"))
    (tmp_path / "empty" / "deeper").mkdir(parents=True)
    empty = replace(SUBSET, image_dir=tmp_path / "empty")
    absent = replace(SUBSET, image_dir=tmp_path / "absent")
    assert problems_of(one_dataset(cats, empty, absent)) == [
        f"the picture folder {tmp_path / 'empty'} holds no pictures. "
        "Folders inside it, such as deeper, are not searched; name each as a subset of its own.",
        f"the picture folder {tmp_path / 'absent'} does not exist. Correct image_dir.",
        f"{tmp_path / 'cats' / '001.png'}: is empty (0 bytes). Replace it or remove it.",
        f"{broken}: cannot be decoded (truncated). Replace it or remove it.",
        f"{tmp_path / 'cats' / '002.txt'}: the caption cannot be read (not UTF-8 text). Save it as UTF-8.",
    ]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_reported(tmp_path: Path) -> None:
    subset = folder_with(tmp_path, (64, 64))
    (tmp_path / "000.png").chmod(0)
    assert "permission denied" in problems_of(one_dataset(subset))[0]


def test_pictures_that_fit_no_bucket_are_reported(tmp_path: Path) -> None:
    subset = folder_with(tmp_path, (64, 64), (16, 3000))
    (problem,) = problems_of(one_dataset(subset, like=replace(DATASET, bucket_no_upscale=True)))
    assert problem.startswith(f"{tmp_path / '001.png'}: 16x3000 fits no bucket (a side is shorter than 16 pixels")


def test_limits_that_leave_out_the_resolution_are_reported(tmp_path: Path) -> None:
    subset = folder_with(tmp_path, (64, 64))
    assert problems_of(one_dataset(subset, like=replace(DATASET, min_bucket_reso=256, max_bucket_reso=32))) == [
        "min_bucket_reso 256 is above the resolution 64. Lower min_bucket_reso.",
        "max_bucket_reso 32 is below the resolution 64. Raise max_bucket_reso.",
    ]


def test_a_folder_given_twice_is_used_once(tmp_path: Path) -> None:
    subset = folder_with(tmp_path, (64, 64))
    again = replace(subset, image_dir=tmp_path / "inside" / "..", num_repeats=5)
    (tmp_path / "inside").mkdir()
    index = index_dataset(one_dataset(subset, again))
    assert [item.num_repeats for item in index.items] == [1]
    assert index.warnings == (f"{again.image_dir} is given twice in one dataset; only the first one is used",)


def test_one_folder_in_two_datasets_is_trained_at_both_sizes_and_decoded_once(tmp_path: Path) -> None:
    subset = folder_with(tmp_path, (64, 64), (64, 64), caption=None)
    large = replace(DATASET, resolution=(128, 128), subsets=(subset,))
    seen: list[tuple[int, int]] = []
    index = index_dataset(
        DatasetConfig((replace(DATASET, subsets=(subset,)), large)),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert [(item.dataset, item.bucket) for item in index.items] == [
        (0, (64, 64)),
        (0, (64, 64)),
        (1, (128, 128)),
        (1, (128, 128)),
    ]
    assert seen == [(1, 2), (2, 2)]
    assert len(index.missing_captions) == 2
    assert index.warnings[0].startswith("2 of 2 pictures")


def test_progress_may_interrupt(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(done: int, _total: int) -> None:
        if done == 2:
            raise Stop

    with pytest.raises(Stop):
        index_dataset(one_dataset(folder_with(tmp_path, *[(64, 64)] * 5)), progress=stop)


def test_too_few_regularisation_pictures_repeat_in_turn(tmp_path: Path) -> None:
    train = replace(folder_with(tmp_path / "a", *[(64, 64)] * 4), num_repeats=2)
    reg = replace(folder_with(tmp_path / "b", *[(64, 64)] * 3), is_reg=True)
    index = index_dataset(one_dataset(reg, train))
    assert [(item.is_reg, item.num_repeats) for item in index.items] == [(False, 2)] * 4 + [
        (True, 3),
        (True, 3),
        (True, 2),
    ]
    assert index.num_batches_per_epoch == 16
    assert (index.datasets[0].num_train_images, index.datasets[0].num_reg_images) == (8, 3)


def test_regularisation_pictures_beyond_the_need_are_left_out(tmp_path: Path) -> None:
    train = folder_with(tmp_path / "a", *[(64, 64)] * 3)
    reg = replace(folder_with(tmp_path / "b", *[(64, 64)] * 5), is_reg=True, num_repeats=2)
    index = index_dataset(one_dataset(train, reg))
    # 2 draws are fewer than 3, so a second picture joins with both of its repeats, as in the reference
    assert [item.num_repeats for item in index.items if item.is_reg] == [2, 2]
    assert index.warnings == (
        "3 of 5 regularisation pictures are not used: there are fewer draws of training pictures in an epoch",
    )


def test_a_dataset_of_regularisation_pictures_alone_is_refused(tmp_path: Path) -> None:
    reg = replace(folder_with(tmp_path, (64, 64)), is_reg=True)
    assert problems_of(one_dataset(reg)) == ["dataset 1 has only regularisation pictures. Add pictures to train on."]


def test_no_subset_at_all_is_refused() -> None:
    assert problems_of(one_dataset()) == ["the dataset file names no picture folder. Add a subset with an image_dir."]


def test_pictures_to_encode_beforehand_are_mirrored_where_the_subset_flips(tmp_path: Path) -> None:
    subset = replace(folder_with(tmp_path, (64, 128)), flip_aug=True)
    (item,) = index_dataset(one_dataset(subset)).items
    plain, mirrored = item.centre_pictures()
    assert (plain.is_flipped, mirrored.is_flipped) == (False, True)
    assert plain.crop == mirrored.crop == (0, 8)
    assert plain.resized == (48, 96)


def test_folders_and_broken_links_called_like_pictures_are_named(tmp_path: Path) -> None:
    subset = folder_with(tmp_path, (64, 64))
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    warnings = index_dataset(one_dataset(subset)).warnings
    assert f"{tmp_path}: 2 folders or broken links are called like pictures: folder.png, gone.jpg" in warnings
