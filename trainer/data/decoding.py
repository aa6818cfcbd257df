"""Picture files to upright 8-bit RGB: what decodes, and what becomes of every mode, colour profile and transparency.

The rules:

- The EXIF orientation is applied. (The reference trainer does not.)
- A colour profile other than sRGB is converted to sRGB. (The reference ignores profiles.)
- 16-bit values are scaled to 8 bits; grey, palette and CMYK become RGB.
- Transparency lies on white, unless it is the loss's mask: then the colours under it stay. (The reference always takes
  the colours under it, whatever they are.)
- Of an animation the first frame is taken.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import io
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from trainer.data.buckets import Size

JPEG_XL_PACKAGE = "pillow-jxl-plugin"
READS_JPEG_XL = importlib.util.find_spec("pillow_jxl") is not None

if READS_JPEG_XL:
    # Importing it tells Pillow of the format.
    importlib.import_module("pillow_jxl")

# Pillow loads the plugins of rarer formats when it first meets one. Two threads that do so at the same time can both
# fail to know the format.
Image.init()

MAX_PIXELS = 178_956_970
"""Pixels of the largest picture that is decoded, half a gigabyte of them; Pillow's own limit."""

MIN_SIDE = 16
"""Pixels of the shortest side that is trained on: one token of FLUX is as wide."""

# The limit above holds, with a message that names the file; Pillow warns from half of it on.
Image.MAX_IMAGE_PIXELS = None

EXIF_ORIENTATION = 0x0112
_SIDEWAYS = (5, 6, 7, 8)
"""EXIF orientations that swap width and height."""

DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    EOFError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""What Pillow's decoders raise for broken files."""

_PROFILE_ERRORS = (ImageCms.PyCMSError, OSError, ValueError, TypeError)
_ON_WHITE = (255, 255, 255, 255)


class UnfitPicture(ValueError):
    """A file that cannot be trained on whatever it shows; the text goes after its name."""

    def __init__(self, what: str, hint: str) -> None:
        super().__init__(what)
        self.hint = hint


@dataclass(frozen=True)
class ImageFacts:
    """What is known of a file that decodes: size as displayed (EXIF applied) and the SHA-256 of its bytes.

    `is_transparent` says that some pixel is not opaque, `has_profile` that its colours are not those of sRGB, and
    `other_format` is the format that the file has where its name's ending says another.
    """

    width: int
    height: int
    digest: str
    is_animated: bool = False
    is_transparent: bool = False
    has_profile: bool = False
    is_cmyk: bool = False
    other_format: str | None = None


def check_image(path: Path) -> ImageFacts:
    """Reads the file once and decodes all of it.

    Raises `UnfitPicture` for empty, tiny and huge ones, and one of `DECODE_ERRORS` when decoding fails.
    """
    data = path.read_bytes()
    if not data:
        raise UnfitPicture("is empty (0 bytes)", "Replace it or remove it.")
    with Image.open(io.BytesIO(data)) as image:
        _check_size(image.size)
        image.verify()
    with Image.open(io.BytesIO(data)) as image:
        width, height = image.size
        is_animated = getattr(image, "n_frames", 1) > 1
        is_cmyk, other_format = image.mode == "CMYK", _other_format(path, image.format)
        # JPEG only: every bit is still read, so a truncated file is found, but little of the picture is computed.
        image.draft("RGB", (max(1, width // 8), max(1, height // 8)))
        image.load()
        if image.getexif().get(EXIF_ORIENTATION) in _SIDEWAYS:
            width, height = height, width
        return ImageFacts(
            width,
            height,
            hashlib.sha256(data).hexdigest(),
            is_animated=is_animated,
            is_transparent=_is_transparent(image),
            has_profile=_foreign_profile(image) is not None,
            is_cmyk=is_cmyk,
            other_format=other_format,
        )


def _other_format(path: Path, found: str | None) -> str | None:
    """The format that was found where the file's ending says another; MPO is JPEG with more pictures behind it."""
    found = "JPEG" if found == "MPO" else found
    expected = Image.registered_extensions().get(path.suffix.lower())
    return found if expected is not None and found != expected else None


def decode_failure(error: BaseException) -> str:
    """Why a picture could not be decoded, in a few plain words."""
    if isinstance(error, UnidentifiedImageError):
        return "not a picture, or of an unknown format"
    if isinstance(error, Image.DecompressionBombError):
        return "far too many pixels"
    if isinstance(error, OSError) and error.errno is not None:
        return (error.strerror or "cannot be read").lower()
    return "truncated" if "truncated" in str(error).lower() else "damaged"


def load_image(path: Path, *, is_masked_by_alpha: bool = False) -> Image.Image:
    """The picture as RGB by the rules above; with `is_masked_by_alpha` transparency changes no colour."""
    with Image.open(path) as file:
        profile = _foreign_profile(file)
        upright = _eight_bits(ImageOps.exif_transpose(file))
    alpha = None if is_masked_by_alpha or not upright.has_transparency_data else _alpha(upright)
    colours = _to_srgb(upright, profile) if profile is not None else None
    if colours is None:
        # Palettes through RGBA, because Pillow warns about those with transparency on the direct way.
        colours = upright.convert("RGBA").convert("RGB") if upright.mode in ("P", "PA") else upright.convert("RGB")
    if alpha is None or cast("tuple[int, int]", alpha.getextrema())[0] == 255:
        return colours
    colours.putalpha(alpha)
    return Image.alpha_composite(Image.new("RGBA", colours.size, _ON_WHITE), colours).convert("RGB")


def load_alpha(path: Path) -> Image.Image:
    """How opaque each pixel is, upright, as 8-bit grey: 255 everywhere where the picture has no transparency."""
    with Image.open(path) as file:
        return _alpha(_eight_bits(ImageOps.exif_transpose(file)))


def load_red(path: Path) -> Image.Image:
    """The red channel, upright, as 8-bit grey: of a mask, whose colours are numbers, so that no profile counts."""
    with Image.open(path) as file:
        upright = _eight_bits(ImageOps.exif_transpose(file))
    if upright.mode == "L":
        return upright
    return (upright.convert("RGBA") if upright.mode in ("P", "PA") else upright).convert("RGB").getchannel("R")


def _check_size(size: Size) -> None:
    width, height = size
    if min(size) < MIN_SIDE:
        raise UnfitPicture(
            f"has {width}x{height} pixels, too few to train on",
            f"Each side needs at least {MIN_SIDE}. Replace it or remove it.",
        )
    if width * height > MAX_PIXELS:
        raise UnfitPicture(
            f"has {width}x{height} pixels, too many to decode",
            f"Make it smaller than {MAX_PIXELS // 10**6} megapixels.",
        )


def _eight_bits(image: Image.Image) -> Image.Image:
    """`image`, or what it is with 8 instead of 16 bits of grey. Pillow itself would cut bright values off."""
    if not image.mode.startswith("I"):
        return image
    grey = np.asarray(image).astype(np.int64) >> 8
    return Image.fromarray(grey.clip(0, 255).astype(np.uint8))


def _alpha(image: Image.Image) -> Image.Image:
    return image.convert("RGBA").getchannel("A")


def _is_transparent(image: Image.Image) -> bool:
    if not image.has_transparency_data or image.mode.startswith("I"):
        return False
    return cast("tuple[int, int]", _alpha(image).getextrema())[0] < 255


def _foreign_profile(image: Image.Image) -> ImageCms.ImageCmsProfile | None:
    """The colour profile of the file, None for none, for sRGB itself and for one that cannot be read."""
    data = cast("object", image.info.get("icc_profile"))
    if not isinstance(data, bytes) or not data:
        return None
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
        name = ImageCms.getProfileDescription(profile)
    except _PROFILE_ERRORS:
        return None
    return None if "srgb" in name.lower() else profile


def _to_srgb(image: Image.Image, profile: ImageCms.ImageCmsProfile) -> Image.Image | None:
    """RGB by the profile, or None where it does not belong to the picture's kind of colour."""
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")
    bare = {"RGBA": "RGB", "LA": "L"}.get(image.mode)
    if bare is not None:
        # What is left after the transparency was taken: the colours as stored.
        image = image.convert(bare)
    try:
        return ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except _PROFILE_ERRORS:
        return None
