from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.specs import picture
from trainer.data.ahead import map_ahead
from trainer.data.decoding import DECODE_ERRORS, EXIF_ORIENTATION, check_image, decode_failure, load_alpha, load_image
from trainer.data.images import read_pixels
from trainer.data.pictures import Picture
from trainer.data.resizing import resize
from trainer.schema.base import UserError


def as_picture(path: Path, *, crop: tuple[int, int] = (0, 0), is_flipped: bool = False) -> Picture:
    return Picture(path, "", (64, 48), (32, 32), crop, is_flipped, None)


def test_exif_orientation_turns_the_picture_and_its_size(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 20), (255, 0, 0))
    image.paste((0, 0, 255), (0, 0, 20, 20))
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    for name in ("turned.jpg", "turned.png", "turned.webp"):
        image.save(tmp_path / name, exif=exif)
        facts = check_image(tmp_path / name)
        assert (facts.width, facts.height) == (20, 40)
        upright = np.asarray(load_image(tmp_path / name)).astype(int)
        assert upright.shape == (40, 20, 3)
        assert upright[5, 10, 2] > 200 > 60 > upright[5, 10, 0]
        assert upright[35, 10, 0] > 200 > 60 > upright[35, 10, 2]


def test_transparency_lies_on_white_unless_it_is_the_mask(tmp_path: Path) -> None:
    image = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    image.putpixel((1, 0), (10, 20, 30, 255))
    image.putpixel((2, 0), (100, 0, 255, 51))
    image.save(tmp_path / "clear.png")
    on_white = np.asarray(load_image(tmp_path / "clear.png"))
    assert on_white[0, :3].tolist() == [[255, 255, 255], [10, 20, 30], [224, 204, 255]]
    under = np.asarray(load_image(tmp_path / "clear.png", is_masked_by_alpha=True))
    assert under[0, :3].tolist() == [[10, 20, 30], [10, 20, 30], [100, 0, 255]]
    assert np.asarray(load_alpha(tmp_path / "clear.png"))[0, :3].tolist() == [0, 255, 51]


def test_a_palette_with_transparency_becomes_rgb_without_a_warning(tmp_path: Path) -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    image.save(tmp_path / "palette.png", transparency=bytes([0, 255]))
    assert np.asarray(load_image(tmp_path / "palette.png"))[0, 0].tolist() == [200, 100, 50]


def test_sixteen_bit_grey_is_scaled_and_not_saturated(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 0x8000, dtype=np.uint16)).save(tmp_path / "grey.png")
    assert np.asarray(load_image(tmp_path / "grey.png"))[0, 0].tolist() == [128, 128, 128]


def test_shrinking_averages_the_exact_area_of_each_new_pixel() -> None:
    # 3 -> 2: a new pixel is one and a half old ones wide
    row = np.array([[[0, 30, 0], [90, 60, 0], [240, 90, 255]]], dtype=np.uint8)
    shrunk = resize(Image.fromarray(row), (2, 1), None)
    assert shrunk.tolist() == [[[30, 40, 0], [190, 80, 170]]]
    column = resize(Image.fromarray(row.transpose(1, 0, 2)), (1, 2), "area")
    assert column.tolist() == [[[30, 40, 0]], [[190, 80, 170]]]


def test_shrinking_by_a_whole_factor_equals_the_mean_of_blocks() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (600, 32, 3), dtype=np.uint8)
    expected = np.rint(pixels.reshape(150, 4, 8, 4, 3).astype(np.float64).mean(axis=(1, 3))).astype(np.uint8)
    np.testing.assert_array_equal(resize(Image.fromarray(pixels), (8, 150), None), expected)


def test_shrinking_keeps_a_flat_colour_at_every_size() -> None:
    flat = Image.new("RGB", (317, 211), (255, 1, 128))
    for size in ((316, 210), (100, 67), (7, 5), (317, 1)):
        assert np.unique(resize(flat, size, None).reshape(-1, 3), axis=0).tolist() == [[255, 1, 128]]


def test_enlarging_is_lanczos_unless_another_way_is_asked_for(tmp_path: Path) -> None:
    image = load_image(picture(tmp_path / "a.png", 16, 16))
    default = resize(image, (40, 40), None)
    np.testing.assert_array_equal(default, np.asarray(image.resize((40, 40), Image.Resampling.LANCZOS)))
    ways = {way: resize(image, (40, 40), way) for way in ("nearest", "bilinear", "bicubic", "box", "area", "lanczos")}
    np.testing.assert_array_equal(ways["area"], ways["bilinear"])
    np.testing.assert_array_equal(ways["lanczos"], default)
    assert not np.array_equal(ways["bilinear"], ways["bicubic"])
    with pytest.raises(ValueError, match="unknown way of resizing: magic"):
        resize(image, (40, 40), "magic")


def test_pixels_are_cut_normalised_and_flipped(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png", 64, 48)
    pixels = np.asarray(load_image(path)).astype(np.float32)
    tensor = read_pixels(as_picture(path, crop=(10, 7)))
    assert tensor.shape == (3, 32, 32)
    assert tensor.dtype == torch.float32
    expected = torch.from_numpy(pixels[7:39, 10:42] / 127.5 - 1.0).permute(2, 0, 1)
    torch.testing.assert_close(tensor, expected, atol=1e-6, rtol=0)
    assert torch.equal(read_pixels(as_picture(path, crop=(10, 7), is_flipped=True)), tensor.flip(2))


def test_black_is_minus_one_and_white_is_one(tmp_path: Path) -> None:
    Image.new("RGB", (64, 48), (0, 255, 0)).save(tmp_path / "green.png")
    tensor = read_pixels(as_picture(tmp_path / "green.png"))
    assert tensor.amin(dim=(1, 2)).tolist() == [-1.0, 1.0, -1.0]
    assert tensor.amax(dim=(1, 2)).tolist() == [-1.0, 1.0, -1.0]


def test_a_crop_outside_the_picture_is_a_mistake_of_the_caller(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        read_pixels(as_picture(picture(tmp_path / "a.png"), crop=(40, 0)))


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp"])
def test_half_a_file_is_found_out(tmp_path: Path, suffix: str) -> None:
    path = picture(tmp_path / f"half{suffix}", 200, 200)
    check_image(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DECODE_ERRORS) as failure:
        check_image(path)
    assert decode_failure(failure.value) in ("truncated", "damaged", "not a picture, or of an unknown format")


def test_one_wrong_byte_in_a_png_is_found_out(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png", 64, 64)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(DECODE_ERRORS):
        check_image(path)


def test_a_wrong_checksum_in_a_png_is_found_out(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png", 64, 64)
    data = bytearray(path.read_bytes())
    data[data.index(b"IEND") - 5] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(DECODE_ERRORS):
        check_image(path)


def test_a_picture_that_vanishes_during_the_run_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.png: cannot be decoded \(no such file or directory\)"):
        read_pixels(as_picture(tmp_path / "gone.png"))


def test_mapping_ahead_keeps_the_order_and_works_in_parallel() -> None:
    together = threading.Barrier(4)

    def slow(value: int) -> int:
        together.wait(timeout=60)  # none goes on before four are at it
        time.sleep(0.005 * (4 - value % 4))
        return value * value

    assert list(map_ahead(slow, range(16), num_threads=8)) == [value * value for value in range(16)]


def test_mapping_ahead_takes_no_more_values_than_the_window() -> None:
    taken: list[int] = []

    def values() -> Iterator[int]:
        for value in range(100):
            taken.append(value)
            yield value

    results = map_ahead(abs, values(), num_threads=2, num_ahead=3)
    assert [next(results), next(results)] == [0, 1]
    assert len(taken) == 5
    results.close()
    assert len(taken) == 5
