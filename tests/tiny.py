"""A whole set of tiny models, and a small captioned dataset, for tests. The maker is the demo's own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trainer.tools.tiny_models import (
    dataset_toml,
    make_autoencoder,
    make_clip_l,
    make_flux,
    make_images,
    make_t5xxl,
    make_tokenizers,
)


@dataclass(frozen=True)
class TinyModels:
    """Files of about 3 MB together. All bf16; text width 64, pooled width 32, 2 double and 4 single blocks."""

    flux_dev: Path
    flux_schnell: Path
    ae: Path
    clip_l: Path
    t5xxl: Path
    clip_l_tokenizer: Path
    t5xxl_tokenizer: Path

    def arguments(self, *, schnell: bool = False) -> list[str]:
        """The command line options that name these files."""
        return [
            f"--pretrained_model_name_or_path={self.flux_schnell if schnell else self.flux_dev}",
            f"--clip_l={self.clip_l}",
            f"--t5xxl={self.t5xxl}",
            f"--ae={self.ae}",
            f"--clip_l_tokenizer={self.clip_l_tokenizer}",
            f"--t5xxl_tokenizer={self.t5xxl_tokenizer}",
        ]


def make_tiny_models(folder: Path) -> TinyModels:
    clip_tokenizer, t5_tokenizer = make_tokenizers(folder)
    return TinyModels(
        flux_dev=make_flux(folder / "flux_dev.safetensors", axes_dim=(4, 10, 10)),
        flux_schnell=make_flux(folder / "flux_schnell.safetensors", hidden=64, heads=2, guidance=False, seed=21),
        ae=make_autoencoder(folder / "ae.safetensors"),
        clip_l=make_clip_l(folder / "clip_l.safetensors"),
        t5xxl=make_t5xxl(folder / "t5xxl.safetensors"),
        clip_l_tokenizer=clip_tokenizer,
        t5xxl_tokenizer=t5_tokenizer,
    )


def make_full_depth_flux(path: Path) -> Path:
    """A FLUX transformer with the published 19 double and 38 single blocks, each very small."""
    return make_flux(path, hidden=32, heads=2, depth=19, depth_single=38, seed=31)


def make_tiny_dataset(folder: Path, *, count: int = 4, resolution: int = 64, num_repeats: int = 1) -> Path:
    """`count` captioned pictures in ``folder/images`` and the dataset file that names them, whose path is returned."""
    sizes = ((resolution, resolution), (resolution + resolution // 2, resolution))
    make_images(folder / "images", count, sizes=sizes)
    path = folder / "dataset.toml"
    path.write_text(dataset_toml(folder / "images", resolution=resolution, num_repeats=num_repeats), encoding="utf-8")
    return path
