"""What becomes of pictures of every kind: modes, profiles, animations, and files that are no good."""

from __future__ import annotations

import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from tests.data.specs import DATASET, SUBSET, one_dataset, picture
from trainer.data import decoding
from trainer.data.decoding import check_image, load_image, load_red
from trainer.data.index import index_dataset
from trainer.data.listing import IMAGE_SUFFIXES
from trainer.schema.base import UserError
from trainer.schema.dataset_keys import DatasetConfig

COLOUR = (200, 100, 50)


def first_pixel(path: Path) -> list[int]:
    return np.asarray(load_image(path))[0, 0].tolist()


def wide_gamut_profile() -> bytes:
    """sRGB's profile with red and green primaries swapped, under a name of its own: no colour stays as it is."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    (count,) = struct.unpack_from(">I", data, 128)
    entries = {bytes(data[132 + 12 * n : 136 + 12 * n]): 132 + 12 * n for n in range(count)}
    red, green = entries[b"rXYZ"], entries[b"gXYZ"]
    data[red + 4 : red + 12], data[green + 4 : green + 12] = data[green + 4 : green + 12], data[red + 4 : red + 12]
    # Every text of the file that names it, as UTF-16.
    return bytes(data).replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be"))


@pytest.mark.parametrize(
    ("mode", "name", "expected"),
    [
        ("RGB", "a.png", COLOUR),
        ("RGB", "a.avif", COLOUR),
        ("RGB", "a.webp", COLOUR),
        ("RGB", "a.bmp", COLOUR),
        ("P", "a.png", COLOUR),
        ("L", "a.png", (124, 124, 124)),
        ("LA", "a.png", (124, 124, 124)),
        ("1", "a.png", (255, 255, 255)),
        ("CMYK", "a.jpg", COLOUR),
    ],
)
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str, name: str, expected: tuple[int, int, int]) -> None:
    image = Image.new("RGB", (32, 32), COLOUR)
    image = image.convert("L").convert("LA") if mode == "LA" else image.convert(mode)
    if mode == "1":
        image = Image.new("1", (32, 32), 1)
    image.save(tmp_path / name, lossless=name == "a.webp", quality=100)
    assert first_pixel(tmp_path / name) == pytest.approx(list(expected), abs=6)
    facts = check_image(tmp_path / name)
    assert (facts.width, facts.height) == (32, 32)
    assert not facts.is_animated
    assert not facts.is_transparent
    assert not facts.has_profile


def test_colours_are_converted_to_srgb_by_the_files_profile(tmp_path: Path) -> None:
    image = Image.new("RGB", (32, 32), (250, 10, 10))
    image.save(tmp_path / "plain.png")
    image.save(tmp_path / "srgb.png", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    image.save(tmp_path / "swapped.png", icc_profile=wide_gamut_profile())
    image.save(tmp_path / "broken.png", icc_profile=b"no profile")
    transparent = image.convert("RGBA")
    transparent.save(tmp_path / "clear.png", icc_profile=wide_gamut_profile())
    assert first_pixel(tmp_path / "plain.png") == [250, 10, 10]
    assert first_pixel(tmp_path / "srgb.png") == [250, 10, 10]
    assert first_pixel(tmp_path / "broken.png") == [250, 10, 10]
    assert first_pixel(tmp_path / "swapped.png") == pytest.approx([10, 250, 10], abs=12)
    assert first_pixel(tmp_path / "clear.png") == pytest.approx([10, 250, 10], abs=12)
    # A profile of another kind of colour than the picture's says nothing about it.
    image.convert("L").save(tmp_path / "grey.png", icc_profile=wide_gamut_profile())
    assert first_pixel(tmp_path / "grey.png") == [82, 82, 82]
    found = {path.name for path in tmp_path.iterdir() if check_image(path).has_profile}
    assert found == {"swapped.png", "clear.png", "grey.png"}
    # In a mask numbers are numbers.
    assert np.asarray(load_red(tmp_path / "swapped.png"))[0, 0] == 250


def test_pictures_that_are_not_used_as_they_are_are_named_once(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (64, 64), (value, 0, 0)) for value in (250, 5)]
    frames[0].save(tmp_path / "moving.webp", save_all=True, append_images=frames[1:], lossless=True)
    Image.new("RGB", (64, 64)).save(tmp_path / "profile.png", icc_profile=wide_gamut_profile())
    Image.new("RGBA", (64, 64)).save(tmp_path / "clear.png")
    picture(tmp_path / "long.png", 640, 64)
    assert first_pixel(tmp_path / "moving.webp") == pytest.approx([250, 0, 0], abs=2)
    subset = replace(SUBSET, image_dir=tmp_path, class_tokens="x")
    both = DatasetConfig(tuple(replace(each, subsets=(subset,)) for each in (DATASET, replace(DATASET, batch_size=2))))
    notes = index_dataset(both).warnings[-4:]
    assert notes == (
        "1 pictures are animated; the first frame is used: moving.webp",
        "1 pictures have a colour profile of their own and are converted to sRGB: profile.png",
        "1 pictures are transparent in places; these become white (alpha_mask leaves them out of the loss instead): "
        "clear.png",
        "1 pictures lose more than half of their area to the crop: long.png",
    )


def huge_png(path: Path, side: int) -> None:
    """The header of a picture of `side` x `side` pixels, and nothing behind it."""
    picture(path, 32, 32)
    data = bytearray(path.read_bytes())
    struct.pack_into(">II", data, 16, side, side)
    struct.pack_into(">I", data, 29, zlib.crc32(bytes(data[12:29])))
    path.write_bytes(data)


def test_files_that_cannot_be_trained_on_are_explained_together(tmp_path: Path) -> None:
    (tmp_path / "0_empty.png").write_bytes(b"")
    Image.new("RGB", (1, 1)).save(tmp_path / "1_tiny.png")
    huge_png(tmp_path / "2_huge.png", 20_000)
    (tmp_path / "3_text.jpg").write_text("not a picture")
    Image.new("RGB", (64, 64)).save(tmp_path / "4_named_jpg.png", format="JPEG")
    with pytest.raises(UserError) as failure:
        index_dataset(one_dataset(replace(SUBSET, image_dir=tmp_path, class_tokens="x")))
    assert [str(problem) for problem in failure.value.problems] == [
        f"{tmp_path / '0_empty.png'}: is empty (0 bytes). Replace it or remove it.",
        f"{tmp_path / '1_tiny.png'}: has 1x1 pixels, too few to train on. "
        "Each side needs at least 16. Replace it or remove it.",
        f"{tmp_path / '2_huge.png'}: has 20000x20000 pixels, too many to decode. Make it smaller than 178 megapixels.",
        f"{tmp_path / '3_text.jpg'}: cannot be decoded (not a picture, or of an unknown format). Replace it or remove it.",
    ]


def test_a_picture_with_a_wrong_ending_is_read_by_its_content(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), COLOUR).save(tmp_path / "a.png", format="JPEG", quality=100)
    assert first_pixel(tmp_path / "a.png") == pytest.approx(list(COLOUR), abs=3)


def test_jpeg_xl_is_read_with_its_plugin_and_asked_for_without(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", caption="x")
    (tmp_path / "b.jxl").write_bytes(b"\xff\x0a")
    subset = replace(SUBSET, image_dir=tmp_path)
    assert (".jxl" in IMAGE_SUFFIXES) == decoding.READS_JPEG_XL
    if decoding.READS_JPEG_XL:
        with pytest.raises(UserError, match=r"b\.jxl: cannot be decoded"):
            index_dataset(one_dataset(subset))
    else:
        assert index_dataset(one_dataset(subset)).warnings == (
            f"{tmp_path}: 1 JPEG XL pictures need pip install pillow-jxl-plugin and are left out: b.jxl",
        )
