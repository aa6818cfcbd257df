from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.specs import DATASET, SUBSET, one_dataset, picture
from trainer.data.batches import epoch_batches
from trainer.data.cache import mask_key, mask_requests
from trainer.data.index import index_dataset
from trainer.data.items import DatasetIndex
from trainer.data.masks import read_mask, to_latent_size
from trainer.data.pictures import Mask, has_shape_of
from trainer.schema.base import UserError
from trainer.schema.dataset_keys import DatasetSpec, SubsetSpec

SQUARE = replace(DATASET, enable_bucket=False)


def masked_folder(
    folder: Path, *, ending: str = ".png", count: int = 2, size: tuple[int, int] = (64, 64)
) -> SubsetSpec:
    """Pictures with a mask each, white on the left quarter."""
    for number in range(count):
        picture(folder / "images" / f"{number}.png", *size, seed=number, caption="a cat")
        mask = Image.new("L", size)
        mask.paste(255, (0, 0, size[0] // 4, size[1]))
        (folder / "masks").mkdir(exist_ok=True)
        mask.save(folder / "masks" / f"{number}{ending}")
    return replace(SUBSET, image_dir=folder / "images", conditioning_data_dir=folder / "masks")


def index_of(*subsets: SubsetSpec, like: DatasetSpec = SQUARE) -> DatasetIndex:
    return index_dataset(one_dataset(*subsets, like=like))


def problems_of(*subsets: SubsetSpec) -> list[str]:
    with pytest.raises(UserError) as failure:
        index_of(*subsets)
    return [str(problem) for problem in failure.value.problems]


def only_mask(index: DatasetIndex, *, is_flipped: bool = False) -> Mask:
    item = index.items[0]
    mask = item.mask((0, 0), is_flipped=is_flipped)
    assert mask is not None
    return mask


def test_a_mask_is_reduced_to_the_mean_of_each_latents_pixels() -> None:
    weights = torch.zeros(2, 16, 24)
    weights[1, 4:8, :8] = 1.0
    reduced = to_latent_size(weights, 2, 3)
    assert reduced.tolist() == [[[0.0] * 3] * 2, [[0.5, 0.0, 0.0], [0.0, 0.0, 0.0]]]


def test_the_mask_of_a_picture_is_the_red_channel_of_the_file_with_its_name(tmp_path: Path) -> None:
    index = index_of(masked_folder(tmp_path))
    assert read_mask(only_mask(index)).tolist() == [[1.0, 1.0] + [0.0] * 6] * 8
    Image.merge("RGB", [Image.new("L", (64, 64), value) for value in (51, 255, 255)]).save(tmp_path / "masks" / "0.png")
    assert read_mask(only_mask(index_of(replace(index.items[0].subset)))).unique().tolist() == pytest.approx([0.2])


def test_a_mask_is_turned_cut_and_mirrored_as_its_picture_is(tmp_path: Path) -> None:
    subset = replace(masked_folder(tmp_path, size=(128, 64)), flip_aug=True)
    index = index_of(subset)
    plain, mirrored = index.items[0].centre_masks()
    # 128 wide, of which the middle 64 stay: the left quarter is cut off.
    assert read_mask(plain).sum() == 0
    left = replace(plain, crop=(8, 0))
    assert read_mask(left)[0].tolist() == [1.0] * 3 + [0.0] * 5
    assert read_mask(replace(left, is_flipped=True))[0].tolist() == [0.0] * 5 + [1.0] * 3
    assert mirrored.is_flipped
    for plan in epoch_batches(index, 1, 1):
        (planned,) = plan.items
        assert planned.mask is not None
        assert (planned.mask.crop, planned.mask.is_flipped) == (planned.picture.crop, planned.picture.is_flipped)


def test_a_mask_follows_a_random_crop(tmp_path: Path) -> None:
    subset = replace(masked_folder(tmp_path, size=(128, 64)), random_crop=True)
    index = index_of(subset)
    for epoch in range(20):
        (planned, *_) = epoch_batches(index, 3, epoch)[0].items
        assert planned.mask is not None
        columns = read_mask(planned.mask)[0] * 8
        assert columns.sum() == pytest.approx(max(0, 32 - planned.crop[0]))


def test_transparency_is_the_mask_and_leaves_colours_alone(tmp_path: Path) -> None:
    pixels = np.full((64, 64, 4), 200, dtype=np.uint8)
    pixels[:, :, 3] = 255
    pixels[:8, :8, 3] = 51
    Image.fromarray(pixels).save(tmp_path / "0.png")
    picture(tmp_path / "1.png")
    subset = replace(SUBSET, image_dir=tmp_path, class_tokens="cat", alpha_mask=True)
    transparent, opaque = index_of(subset).items
    mask = transparent.mask((0, 0), is_flipped=False)
    assert mask is not None
    weights = read_mask(mask)
    assert weights[0, 0].item() == pytest.approx(0.2)
    assert weights.flatten()[1:].unique().tolist() == [1.0]
    assert transparent.picture((0, 0), is_flipped=False).is_masked_by_alpha
    assert opaque.mask((0, 0), is_flipped=False) is None
    without = index_of(replace(subset, alpha_mask=False))
    assert without.items[0].mask((0, 0), is_flipped=False) is None
    assert without.warnings[-1].startswith("1 pictures are transparent in places; these become white")
    assert not any("transparent" in warning for warning in index_of(subset).warnings)


def test_a_mask_of_its_own_outranks_transparency(tmp_path: Path) -> None:
    subset = replace(masked_folder(tmp_path, count=1), alpha_mask=True)
    Image.new("RGBA", (64, 64), (10, 20, 30, 0)).save(tmp_path / "images" / "0.png")
    index = index_of(subset)
    assert only_mask(index).channel == "red"
    assert not index.items[0].picture((0, 0), is_flipped=False).is_masked_by_alpha


def test_masks_may_have_another_ending_and_size_but_not_another_shape(tmp_path: Path) -> None:
    subset = masked_folder(tmp_path, ending=".webp", count=1)
    Image.new("L", (32, 32), 255).save(tmp_path / "masks" / "0.webp", lossless=True)
    assert read_mask(only_mask(index_of(subset))).unique().tolist() == [1.0]
    Image.new("L", (32, 64), 255).save(tmp_path / "masks" / "0.webp", lossless=True)
    assert problems_of(subset) == [
        f"{tmp_path / 'masks' / '0.webp'}: this mask is 32x64, but its picture 64x64. Make the mask of the picture's size."
    ]
    assert has_shape_of((100, 50), (201, 100))
    assert not has_shape_of((104, 50), (200, 100))


def test_missing_double_and_broken_masks_are_problems_and_surplus_ones_a_warning(tmp_path: Path) -> None:
    subset = masked_folder(tmp_path, count=3)
    (tmp_path / "masks" / "1.png").unlink()
    Image.new("L", (64, 64)).save(tmp_path / "masks" / "2.jpg")
    (tmp_path / "masks" / "0.png").write_bytes(b"no picture")
    folder = tmp_path / "masks"
    assert problems_of(subset) == [
        f"{folder}: 1 pictures have no mask: 1.png. A mask has the name of its picture; white all over teaches everything.",
        f"{folder}: there are several masks of one picture: 2.jpg, 2.png. Keep one.",
    ]
    (folder / "2.jpg").unlink()
    (folder / "0.png").rename(folder / "1.png")
    Image.new("L", (64, 64)).save(folder / "0.png")
    assert problems_of(subset) == [
        f"{folder / '1.png'}: cannot be decoded (not a picture, or of an unknown format). Replace it or remove it."
    ]
    Image.new("L", (64, 64), 255).save(folder / "1.png")
    Image.new("L", (64, 64), 255).save(folder / "other.png")
    assert index_of(subset).warnings == (
        f"{folder}: 1 masks belong to no picture: other.png",
        "1 masks are black all over; their pictures teach nothing: 0.png",
    )
    absent = replace(subset, conditioning_data_dir=tmp_path / "absent")
    assert problems_of(absent) == [
        f"the mask folder {tmp_path / 'absent'} does not exist. Correct conditioning_data_dir."
    ]


def test_masks_are_kept_by_content_and_cut(tmp_path: Path) -> None:
    subset = replace(masked_folder(tmp_path, count=2, size=(128, 64)), flip_aug=True)
    requests = mask_requests(index_of(subset))
    # Both masks are the same file content: two orientations are left.
    assert len(requests) == 4
    assert len({request.key for request in requests}) == 2
    assert torch.equal(requests[0].load(), read_mask(index_of(subset).items[0].centre_masks()[0]))
    mask = only_mask(index_of(subset))
    changed = [replace(mask, digest="0"), replace(mask, crop=(1, 0)), replace(mask, is_flipped=True)]
    changed += [replace(mask, channel="alpha"), replace(mask, bucket=(32, 32)), replace(mask, resized=(256, 128))]
    assert len({mask_key(each) for each in (mask, *changed)}) == 7
