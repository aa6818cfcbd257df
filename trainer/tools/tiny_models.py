"""The demo's bundle: small trained models in the published file formats, and pictures made on the spot to train on.

The makers of models with random weights stand here too, for the tests: both go through exactly the production path, with
the key names of the original FLUX.1 release for the transformer and the autoencoder, those of transformers for CLIP-L
and T5, and tokenizer.json files. Only numpy and Pillow are needed, and everything together takes less than a second.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from trainer.schema.base import UserError
from trainer.tools.demo_pictures import demo_dataset_toml, make_demo_pictures
from trainer.tools.tiny_autoencoder import make_autoencoder
from trainer.tools.tiny_chroma import make_chroma
from trainer.tools.tiny_networks import make_clip_l, make_flux, make_t5xxl
from trainer.tools.tiny_pictures import make_images
from trainer.tools.tiny_tokenizers import make_tokenizers
from trainer.tools.world import SIDE, TRIGGER

__all__ = [
    "DEMO_PROMPTS",
    "DEMO_VERSION",
    "PICTURES_SEED",
    "TRAINED_FILES",
    "DemoBundle",
    "dataset_toml",
    "make_autoencoder",
    "make_chroma",
    "make_clip_l",
    "make_demo_bundle",
    "make_flux",
    "make_images",
    "make_t5xxl",
    "make_tokenizers",
]

DEMO_VERSION = 9
TRAINED_FILES: Final = Path(__file__).parents[1] / "demo_bundle"
"""The models which `trainer.tools.train_demo_models` has trained; they come with the program."""

PICTURES_SEED: Final = 5
DEMO_PROMPTS: Final = (
    f"a large {TRIGGER} in the center, green background",
    f"a large {TRIGGER} on the left, white striped background",
    "a large blue star in the center, yellow background",
    "a small red heart on the right, purple dotted background",
)
_MARKER = "bundle.json"


@dataclass(frozen=True)
class DemoBundle:
    """Paths of everything the demo trains on. All lie below `folder`."""

    folder: Path
    flux: Path
    ae: Path
    clip_l: Path
    t5xxl: Path
    clip_l_tokenizer: Path
    t5xxl_tokenizer: Path
    images: Path
    dataset_config: Path
    sample_prompts: Path

    @classmethod
    def at(cls, folder: Path) -> DemoBundle:
        return cls(
            folder=folder,
            flux=folder / "models" / "flux1-demo.safetensors",
            ae=folder / "models" / "ae.safetensors",
            clip_l=folder / "models" / "clip_l.safetensors",
            t5xxl=folder / "models" / "t5xxl.safetensors",
            clip_l_tokenizer=folder / "models" / "clip_l_tokenizer",
            t5xxl_tokenizer=folder / "models" / "t5xxl_tokenizer",
            images=folder / "images",
            dataset_config=folder / "dataset.toml",
            sample_prompts=folder / "sample_prompts.txt",
        )


def make_demo_bundle(folder: Path) -> DemoBundle:
    """Make the demo's models, pictures, dataset file and prompts in `folder`, unless they are there already.

    The bundle is built beside `folder` and renamed into place with its marker file, so that a folder with the right
    marker is a whole bundle. Anything else found there (half-made, of another version, or moved from another place,
    since dataset.toml holds an absolute path) is replaced.
    """
    folder = folder.expanduser().resolve()
    marker = json.dumps({"version": DEMO_VERSION, "folder": str(folder)}, ensure_ascii=False)
    if _read_marker(folder) == marker:
        return DemoBundle.at(folder)

    folder.parent.mkdir(parents=True, exist_ok=True)
    workplace = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _fill_bundle(DemoBundle.at(workplace / "new"), images_at=folder / "images")
        (workplace / "new" / _MARKER).write_text(marker, encoding="utf-8")
        try:
            if folder.exists():
                folder.rename(workplace / "old")
            (workplace / "new").rename(folder)
        except OSError:
            # Someone else may have finished the same bundle in the meantime; theirs is as good.
            if _read_marker(folder) != marker:
                raise
    finally:
        shutil.rmtree(workplace, ignore_errors=True)
    return DemoBundle.at(folder)


def _read_marker(folder: Path) -> str | None:
    try:
        return (folder / _MARKER).read_text(encoding="utf-8")
    except OSError:
        return None


def _fill_bundle(bundle: DemoBundle, *, images_at: Path) -> None:
    models = bundle.flux.parent
    try:
        shutil.copytree(TRAINED_FILES, models)
    except OSError as error:
        raise UserError(
            f"the demo's models cannot be copied ({error.strerror or error})",
            str(TRAINED_FILES),
            "Get the program's files again, and make room on the disk.",
        ) from error
    make_demo_pictures(bundle.images, seed=PICTURES_SEED)
    bundle.dataset_config.write_text(demo_dataset_toml(images_at), encoding="utf-8")
    # With and without the trigger word: the concept appears, and the rest stays.
    prompts = [f"{prompt} --w {SIDE} --h {SIDE} --s 16 --d {index + 1}" for index, prompt in enumerate(DEMO_PROMPTS)]
    bundle.sample_prompts.write_text("\n".join(prompts) + "\n", encoding="utf-8")


def dataset_toml(images: Path, *, resolution: int, num_repeats: int = 1, batch_size: int = 1) -> str:
    """A dataset file for one folder of captioned pictures, with aspect buckets."""
    # A JSON string is also a TOML basic string as long as only ASCII control characters are escaped.
    lines = (
        "[general]",
        "enable_bucket = true",
        'caption_extension = ".txt"',
        "",
        "[[datasets]]",
        f"resolution = {resolution}",
        f"batch_size = {batch_size}",
        "min_bucket_reso = 64",
        f"max_bucket_reso = {2 * resolution}",
        "",
        "  [[datasets.subsets]]",
        f"  image_dir = {json.dumps(os.fspath(images), ensure_ascii=False)}",
        f"  num_repeats = {num_repeats}",
        "",
    )
    return "\n".join(lines)
