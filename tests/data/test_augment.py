from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.data.specs import DATASET, SUBSET, one_dataset, picture
from trainer.data.augment import ColourChange, Face, change_colour, draw_colour, draw_face_crop, face_of
from trainer.data.batches import epoch_batches
from trainer.data.cache import latent_requests
from trainer.data.images import read_pixels
from trainer.data.index import index_dataset
from trainer.schema.base import UserError

SQUARE = replace(DATASET, enable_bucket=False)


def test_one_draw_in_three_changes_colours_half_of_these_the_hue() -> None:
    changes = [draw_colour(random.Random(seed)) for seed in range(6000)]
    kinds = Counter(None if change is None else change.kind for change in changes)
    assert kinds["hue"] / 6000 == pytest.approx(0.165, abs=0.015)
    assert kinds["gamma"] / 6000 == pytest.approx(0.165, abs=0.015)
    turns = [change.amount for change in changes if change is not None and change.kind == "hue"]
    exponents = [change.amount for change in changes if change is not None and change.kind == "gamma"]
    assert -16 <= min(turns) < -14 < 14 < max(turns) <= 16
    assert 0.95 <= min(exponents) < 0.955 < 1.045 < max(exponents) <= 1.05


def test_colours_change_by_hue_or_exponent() -> None:
    red = np.full((2, 2, 3), (200, 0, 0), dtype=np.uint8)
    turned = change_colour(red, ColourChange("hue", 120.0))[0, 0].tolist()
    assert turned == pytest.approx([0, 200, 0], abs=5)
    assert np.array_equal(change_colour(red, ColourChange("hue", 0.0)), red)
    assert change_colour(red, ColourChange("gamma", 1.02))[0, 0].tolist() == [int(200**1.02), 0, 0]
    assert change_colour(red, ColourChange("gamma", 1.05))[0, 0].tolist() == [255, 0, 0]


def test_color_aug_changes_some_draws_of_a_picture_and_nothing_else(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", caption="a cat")
    plain = replace(SUBSET, image_dir=tmp_path, flip_aug=True)
    index, coloured = (
        index_dataset(one_dataset(each, like=SQUARE)) for each in (plain, replace(plain, color_aug=True))
    )
    num_changed = 0
    for epoch in range(30):
        (one,), (other,) = epoch_batches(index, 1, epoch)[0].items, epoch_batches(coloured, 1, epoch)[0].items
        assert one.colour is None
        assert (one.is_flipped, one.crop) == (other.is_flipped, other.crop)
        is_same = torch.equal(read_pixels(one.picture), read_pixels(other.picture))
        assert is_same == (other.colour is None)
        num_changed += not is_same
    assert 3 <= num_changed <= 18


@pytest.mark.parametrize(
    ("name", "face"),
    [
        ("cat_320_200_90_120", Face((320, 200), (90, 120))),
        ("a_b_1_2_3_4", Face((1, 2), (3, 4))),
        ("320_200_90_120", None),
        ("cat_0_200_90_120", None),
        ("cat_320_200_0_0", None),
        ("cat_x_200_90_120", None),
        ("cat", None),
    ],
)
def test_a_face_is_read_from_the_name(name: str, face: Face | None) -> None:
    assert face_of(Path(f"{name}.png")) == face


def test_a_face_is_in_the_middle_and_as_large_as_asked_for() -> None:
    face = Face((600, 300), (100, 80))
    # 256 pixels are to be 4 faces: the face is 64 long, so all is scaled by 0.64.
    resized, crop = draw_face_crop((1000, 800), face, (256, 256), (4.0, 4.0), random.Random(0), is_random=False)
    assert resized == (640, 512)
    assert crop == (384 - 128, 192 - 128)
    scales: set[int] = set()
    for seed in range(200):
        resized, crop = draw_face_crop((1000, 800), face, (256, 256), (2.0, 4.0), random.Random(seed), is_random=False)
        # Never enlarged: at 1.0 the crop is 2.56 faces.
        assert 640 <= resized[0] <= 1000
        middle = (600 * resized[0] / 1000, 300 * resized[0] / 1000)
        assert abs(crop[0] + 128 - middle[0]) <= 6
        assert abs(crop[1] + 128 - middle[1]) <= 6
        scales.add(resized[0])
    assert len(scales) > 50


def test_a_face_crop_lies_in_the_picture_and_covers_the_bucket() -> None:
    rng = random.Random(5)
    for _ in range(3000):
        size = (rng.randint(16, 900), rng.randint(16, 900))
        face = Face((rng.randint(1, size[0]), rng.randint(0, size[1])), (rng.randint(1, 400), rng.randint(1, 400)))
        bucket = (rng.choice((64, 128, 256)), rng.choice((64, 128, 256)))
        low = rng.uniform(0.5, 6)
        resized, crop = draw_face_crop(size, face, bucket, (low, low + rng.random()), rng, is_random=rng.random() < 0.5)
        assert all(0 <= crop[axis] <= resized[axis] - bucket[axis] for axis in (0, 1))
        assert abs(resized[0] / size[0] - resized[1] / size[1]) <= 1 / min(size)


def test_face_crops_are_drawn_without_buckets_and_left_alone_with_them(tmp_path: Path) -> None:
    picture(tmp_path / "cat_200_60_20_20.png", 256, 128, caption="a cat")
    picture(tmp_path / "dog.png", 256, 128, caption="a dog")
    subset = replace(SUBSET, image_dir=tmp_path, face_crop_aug_range=(3.2, 6.4))
    index = index_dataset(one_dataset(subset, like=SQUARE))
    drawn = [batch.items[0] for epoch in range(20) for batch in epoch_batches(index, 1, epoch)]
    faces = [planned for planned in drawn if planned.item.face is not None]
    assert len({planned.resized for planned in faces}) > 10
    for planned in faces:
        middle = 200 * planned.resized[0] / 256
        assert planned.crop[0] < middle < planned.crop[0] + 64, "the face is seen"
        assert planned.picture.resized == planned.resized
    assert len({planned.crop for planned in drawn if planned.item.face is None}) == 1
    assert index.warnings == (
        "1 pictures have no face in their names, such as cat_320_200_90_120, and are cropped as usual: dog.png",
    )
    assert [item.face for item in index_dataset(one_dataset(subset)).items] == [None, None]


def test_a_random_crop_without_buckets_keeps_the_pictures_own_size(tmp_path: Path) -> None:
    picture(tmp_path / "large.png", 200, 100, caption="x")
    picture(tmp_path / "small.png", 60, 100, caption="x")
    subset = replace(SUBSET, image_dir=tmp_path, random_crop=True)
    large, small = index_dataset(one_dataset(subset, like=SQUARE)).items
    assert (large.fit.resized, small.fit.resized) == ((200, 100), (64, 107))
    (kept, _) = index_dataset(one_dataset(replace(subset, random_crop=False), like=SQUARE)).items
    assert kept.fit.resized == (128, 64)


@pytest.mark.parametrize("change", [{"color_aug": True}, {"random_crop": True}, {"face_crop_aug_range": (2.0, 4.0)}])
def test_pictures_that_change_in_every_step_cannot_be_encoded_beforehand(
    tmp_path: Path, change: dict[str, object]
) -> None:
    picture(tmp_path / "a.png", caption="a cat")
    index = index_dataset(one_dataset(replace(SUBSET, image_dir=tmp_path, **change), like=SQUARE))
    with pytest.raises(UserError, match=f"{next(iter(change))} cannot be used together with cache_latents"):
        latent_requests(index, encoder="ae")
