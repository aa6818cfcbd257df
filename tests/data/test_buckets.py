from __future__ import annotations

import random

import pytest

from trainer.data.buckets import (
    Fit,
    bucket_sizes,
    centre_crop,
    fit_to_nearest,
    fit_without_upscale,
    random_crop,
    side_limits,
)


@pytest.mark.parametrize(("side", "longest", "count"), [(1024, 1024, 25), (1024, 2048, 41), (512, 1024, 17)])
def test_there_are_as_many_buckets_as_the_reference_makes(side: int, longest: int, count: int) -> None:
    assert len(bucket_sizes((side, side), 256, longest, 64)) == count


def test_a_longest_side_equal_to_the_resolution_makes_every_other_bucket_smaller() -> None:
    sizes = bucket_sizes((1024, 1024), 256, 1024, 64)
    assert sizes == tuple(sorted(sizes))
    assert all(max(size) == 1024 for size in sizes)
    assert sum(width * height == 1024 * 1024 for width, height in sizes) == 1


def test_limits_are_moved_outwards_to_multiples_of_the_step() -> None:
    assert side_limits(300, 1000, 64) == (256, 1024)
    assert side_limits(256, 1024, 64) == (256, 1024)


def test_a_shortest_side_below_the_step_gives_no_bucket_without_width() -> None:
    assert min(min(size) for size in bucket_sizes((64, 64), 0, 128, 32)) == 32


def test_a_picture_covers_its_bucket_along_one_side_exactly() -> None:
    sizes = bucket_sizes((1024, 1024), 256, 2048, 64)
    for size in ((3000, 2000), (2000, 3000), (333, 777), (5000, 400), (1024, 1024), (17, 16)):
        fit = fit_to_nearest(size, sizes)
        assert fit.resized[0] >= fit.bucket[0]
        assert fit.resized[1] >= fit.bucket[1]
        assert fit.resized[0] == fit.bucket[0] or fit.resized[1] == fit.bucket[1]


def test_the_first_of_two_equally_near_buckets_is_taken() -> None:
    assert fit_to_nearest((100, 100), ((64, 128), (96, 64), (128, 256))).bucket in ((64, 128), (96, 64))
    assert fit_to_nearest((100, 100), ((32, 64), (64, 128))).bucket == (32, 64)


def test_a_picture_of_exactly_a_bucket_size_keeps_it() -> None:
    sizes = ((32, 64), (64, 128))
    assert fit_to_nearest((64, 128), sizes) == Fit((64, 128), (64, 128))


def test_small_pictures_are_not_enlarged_without_upscaling() -> None:
    assert fit_without_upscale((300, 200), (512, 512), 64) == Fit((300, 200), (256, 192))


def test_large_pictures_shrink_to_the_area_without_upscaling() -> None:
    # aspect 1.5 at 512 x 512: ideal 627 x 418; the width as 576 gives 576x384, aspect 1.5, which is the nearer one
    assert fit_without_upscale((3000, 2000), (512, 512), 64) == Fit((576, 384), (576, 384))
    # aspect 0.75: width 384 -> 384x512 (0.75); height 576 -> 384x576 (0.67)
    assert fit_without_upscale((1500, 2000), (512, 512), 64) == Fit((384, 512), (384, 512))


@pytest.mark.parametrize("size", [(40, 400), (8000, 40), (40, 8000), (63, 63)])
def test_a_side_below_one_step_is_refused_instead_of_divided_by(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="shorter than 64 pixels"):
        fit_without_upscale(size, (512, 512), 64)


def test_crops_stay_inside_the_picture() -> None:
    fit = Fit((101, 70), (64, 64))
    assert centre_crop(fit) == (18, 3)
    rng = random.Random(0)
    crops = {random_crop(fit, rng) for _ in range(2000)}
    assert {left for left, _ in crops} == set(range(38))
    assert {top for _, top in crops} == set(range(7))


def random_sizes(count: int) -> list[tuple[int, int]]:
    """Sizes as pictures have them, and strange ones: any area, any shape."""
    rng = random.Random(20)
    return [(int(16 * 2 ** rng.uniform(0, 10)), int(16 * 2 ** rng.uniform(0, 10))) for _ in range(count)]


@pytest.mark.parametrize(("resolution", "step"), [((1024, 1024), 64), ((768, 512), 32), ((512, 512), 16)])
def test_ten_thousand_sizes_find_a_bucket_that_covers_them(resolution: tuple[int, int], step: int) -> None:
    area = resolution[0] * resolution[1]
    sizes = bucket_sizes(resolution, *side_limits(250, 2000, step), step)
    assert sizes == tuple(sorted(set(sizes)))
    assert all(width % step == 0 and height % step == 0 and width * height <= area for width, height in sizes)
    aspects = [width / height for width, height in sizes]
    for size in random_sizes(10_000):
        fit = fit_to_nearest(size, sizes)
        assert fit.bucket in sizes
        assert fit == fit_to_nearest(size, sizes)
        error = abs(fit.bucket[0] / fit.bucket[1] - size[0] / size[1])
        assert size in sizes or error == min(abs(aspect - size[0] / size[1]) for aspect in aspects)
        assert_crops_lie_inside(fit)
        # One side is the bucket's exactly; the other keeps the shape to half a pixel.
        assert any(
            fit.resized[axis] == fit.bucket[axis]
            and abs(fit.resized[1 - axis] - size[1 - axis] * fit.bucket[axis] / size[axis]) <= 0.5 + 1e-9
            for axis in (0, 1)
        )


@pytest.mark.parametrize(("resolution", "step"), [((1024, 1024), 64), ((768, 512), 32), ((512, 512), 16)])
def test_ten_thousand_sizes_are_never_enlarged(resolution: tuple[int, int], step: int) -> None:
    area = resolution[0] * resolution[1]
    num_refused = 0
    for size in random_sizes(10_000):
        try:
            fit = fit_without_upscale(size, resolution, step)
        except ValueError:
            # Only where one side would have no place for a single step.
            scale = min(1.0, (area / (size[0] * size[1])) ** 0.5)
            assert min(size) * scale < 1.5 * step
            num_refused += 1
            continue
        assert fit == fit_without_upscale(size, resolution, step)
        assert all(side % step == 0 and side > 0 for side in fit.bucket)
        # A side is rounded to whole pixels before it is cut to steps: half a pixel more, by the reference's rule.
        short, long = sorted(fit.bucket)
        assert short * long <= area * (short / (short - 0.5)) ** 2 + short
        assert all(new <= old for new, old in zip(fit.resized, size, strict=True))
        assert all(fit.resized[axis] - fit.bucket[axis] < step for axis in (0, 1)), "less than a step is cut off"
        assert_crops_lie_inside(fit)
    assert num_refused < 5000


def assert_crops_lie_inside(fit: Fit) -> None:
    for left, top in (centre_crop(fit), random_crop(fit, random.Random(1))):
        assert 0 <= left <= fit.resized[0] - fit.bucket[0]
        assert 0 <= top <= fit.resized[1] - fit.bucket[1]
