"""sd-scripts' cache files beside the pictures: their names, and which arrays our entries become in them.

`STEM_0640x0480_flux.npz` holds the latents of a picture of 640 x 480 pixels at all training sizes, `STEM_flux_te.npz` one
caption's encodings. Names and arrays are those of kohya-ss/sd-scripts (`library/strategy_flux.py`,
`library/strategy_base.py`). Ours have more arrays, which its readers pass over: see `reference_store`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.data.buckets import Size, centre_crop
from trainer.data.cache import content_key, latent_key, read_unchanged
from trainer.data.cache_files import Entry
from trainer.data.items import DatasetIndex, Item
from trainer.data.masks import LATENT_STRIDE, read_weights
from trainer.data.pictures import Mask
from trainer.data.validation import validation_caption

Array: TypeAlias = NDArray[Any]
LATENTS_ENDING: Final = "_flux.npz"
TEXT_ENDING: Final = "_flux_te.npz"


class ReferenceFile(Protocol):
    """What one file has to hold. All in it is made from one `source`; what is of another one is out of date."""

    @property
    def path(self) -> Path: ...

    @property
    def source(self) -> str: ...

    @property
    def keys(self) -> Mapping[str, str]:
        """The arrays that can be read back, by name, each with the key of the entry that it is."""
        ...

    @property
    def names(self) -> frozenset[str]:
        """All arrays that sd-scripts will look for."""
        ...

    def entry(self, name: str, arrays: Mapping[str, Array]) -> Entry:
        """The entry that one of `keys` is. Raises `KeyError` and `ValueError`."""
        ...

    def arrays(self, entries: Mapping[str, Entry]) -> dict[str, Array]:
        """All of `names`, made from the entries of `keys`, which are given by their keys."""
        ...


# ---- latents ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Cut:
    """What is wanted of a picture at one training size."""

    item: Item
    key: str
    flipped_key: str | None
    has_alpha: bool

    @property
    def suffix(self) -> str:
        width, height = self.item.bucket
        return f"{height // LATENT_STRIDE}x{width // LATENT_STRIDE}"

    @property
    def keys(self) -> dict[str, str]:
        found = {f"latents_{self.suffix}": self.key}
        if self.flipped_key is not None:
            found[f"latents_flipped_{self.suffix}"] = self.flipped_key
        return found

    @property
    def names(self) -> list[str]:
        parts = ["original_size", "crop_ltrb", *(["alpha_mask"] if self.has_alpha else [])]
        return [*self.keys, *(f"{part}_{self.suffix}" for part in parts)]

    def joined(self, other: _Cut) -> _Cut:
        return replace(
            self, flipped_key=self.flipped_key or other.flipped_key, has_alpha=self.has_alpha or other.has_alpha
        )


@dataclass(frozen=True)
class LatentFile:
    """A picture's latents at each size that it is trained at: float32 (16, h, w), with the suffix `_<h>x<w>`."""

    path: Path
    source: str
    cuts: tuple[_Cut, ...]

    @property
    def keys(self) -> Mapping[str, str]:
        return {name: key for cut in self.cuts for name, key in cut.keys.items()}

    @property
    def names(self) -> frozenset[str]:
        return frozenset(name for cut in self.cuts for name in cut.names)

    def entry(self, name: str, arrays: Mapping[str, Array]) -> Entry:
        return {"latents": torch.from_numpy(arrays[name])}

    def arrays(self, entries: Mapping[str, Entry]) -> dict[str, Array]:
        found: dict[str, Array] = {name: entries[key]["latents"].numpy() for name, key in self.keys.items()}
        for cut in self.cuts:
            (left, top), (width, height) = centre_crop(cut.item.fit), cut.item.bucket
            found[f"original_size_{cut.suffix}"] = np.array(cut.item.size, np.int64)
            found[f"crop_ltrb_{cut.suffix}"] = np.array([left, top, left + width, top + height], np.int64)
            if cut.has_alpha:
                found[f"alpha_mask_{cut.suffix}"] = _alpha_mask(cut.item)
        return found


def latent_files(index: DatasetIndex, *, encoder: str) -> tuple[list[LatentFile], int]:
    """The files of all pictures, and how many pictures have none because another one's has the same name.

    The names do not tell `a.png` from `a.jpg` of the same size; the first one has the file. The same holds for a picture
    in two subsets that cut it to one size in different ways. Pictures that are held back for validation are in it as
    they are encoded, without their mirror image.
    """
    files: dict[Path, LatentFile] = {}
    num_without = 0
    items = [*((item, item.subset.flip_aug) for item in index.items), *((item, False) for item in index.validation)]
    for item, is_flipped in items:
        width, height = item.size
        path = item.path.with_name(f"{item.path.stem}_{width:04d}x{height:04d}{LATENTS_ENDING}")
        source = content_key("latents of", item.digest, encoder)
        file = files.get(path, LatentFile(path, source, ()))
        cuts = {cut.suffix: cut for cut in file.cuts}
        cut = _cut(item, encoder, is_flipped=is_flipped)
        earlier = cuts.get(cut.suffix, cut)
        if file.source != source or earlier.key != cut.key:
            num_without += 1
            continue
        files[path] = replace(file, cuts=tuple((cuts | {cut.suffix: earlier.joined(cut)}).values()))
    return list(files.values()), num_without


def _cut(item: Item, encoder: str, *, is_flipped: bool) -> _Cut:
    def key(*, is_flipped: bool) -> str:
        return latent_key(item.picture(centre_crop(item.fit), is_flipped=is_flipped), encoder=encoder)

    return _Cut(item, key(is_flipped=False), key(is_flipped=True) if is_flipped else None, item.subset.alpha_mask)


def _alpha_mask(item: Item) -> Array:
    """(H, W) float32 in [0, 1] in pixels of the bucket: how opaque they are."""
    width, height = item.bucket
    if not item.is_transparent:
        return np.ones((height, width), np.float32)
    cut: tuple[Size, Size, Size] = item.fit.resized, item.bucket, centre_crop(item.fit)
    mask = Mask(item.path, item.digest, "alpha", *cut, False, item.subset.resize_interpolation)
    return read_unchanged(mask, read_weights).numpy()


# ---- text ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextFile:
    """One caption's encodings, in 32 bit and padded to `max_length` tokens. `dtype` is the format that we keep them in.

    `num_tokens` counts a caption's tokens without padding.
    """

    path: Path
    caption: str
    source: str
    max_length: int
    apply_mask: bool
    dtype: torch.dtype
    num_tokens: Callable[[str], int]

    @property
    def keys(self) -> Mapping[str, str]:
        return {"t5_out": self.source}

    @property
    def names(self) -> frozenset[str]:
        return frozenset({"l_pooled", "t5_out", "txt_ids", "t5_attn_mask", "apply_t5_attn_mask"})

    def entry(self, name: str, arrays: Mapping[str, Array]) -> Entry:
        txt, vec = (torch.from_numpy(arrays[each]).to(self.dtype) for each in (name, "l_pooled"))
        length = int(arrays["t5_attn_mask"].sum()) if self.apply_mask else len(txt)
        return {"vec": vec, "txt": txt[:length].contiguous()}

    def arrays(self, entries: Mapping[str, Entry]) -> dict[str, Array]:
        entry = entries[self.source]
        # Padding that the text mask hides is not kept: it is zero here.
        txt = torch.zeros(self.max_length, entry["txt"].shape[1])
        txt[: len(entry["txt"])] = entry["txt"].float()
        return {
            "l_pooled": entry["vec"].float().numpy(),
            "t5_out": txt.numpy(),
            "txt_ids": np.zeros((self.max_length, 3), np.float32),
            "t5_attn_mask": (np.arange(self.max_length) < self.num_tokens(self.caption)).astype(np.int64),
            "apply_t5_attn_mask": np.array(self.apply_mask),
        }


def text_files(
    items: Iterable[Item],
    *,
    key: Callable[[str], str],
    max_length: int,
    apply_mask: bool,
    dtype: torch.dtype,
    num_tokens: Callable[[str], int],
) -> tuple[list[TextFile], int]:
    """The files of all pictures' plain captions, and how many pictures have none because another one's has the same name.

    A file has room for one caption: of several the first one, and of one that is shuffled or loses parts the whole.
    `key` gives the key of a text.
    """
    files: dict[Path, TextFile] = {}
    num_without = 0
    for item in items:
        path, caption = item.path.with_name(f"{item.path.stem}{TEXT_ENDING}"), validation_caption(item)
        file = TextFile(path, caption, key(caption), max_length, apply_mask, dtype, num_tokens)
        num_without += files.setdefault(path, file).source != file.source
    return list(files.values()), num_without
