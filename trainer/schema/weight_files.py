"""From what an option names to the headers of the model's files: one file, shards, a folder, or a hub repository.

A folder is a diffusers or transformers folder with one file or numbered shards and their index, or the whole repository
with such folders below it (`transformer/`, `vae/`, `text_encoder/`, `text_encoder_2/`). Chroma's repositories have no
CLIP-L: there T5 is `text_encoder/`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, cast

from trainer.schema.base import UserError
from trainer.schema.hub_cache import cached_snapshot, hub_id
from trainer.schema.model_kinds import ModelKind, identify, noun
from trainer.schema.safetensors_header import Header, TensorInfo, read_header

_SECOND_ENCODER: Final = "text_encoder_2"
SUBFOLDERS: Final[Mapping[ModelKind, tuple[str, ...]]] = {
    "flux": ("transformer",),
    "chroma": ("transformer",),
    "autoencoder": ("vae",),
    "clip_l": ("text_encoder",),
    "t5xxl": (_SECOND_ENCODER, "text_encoder"),
}
"""Where a repository keeps a model; the first that is there."""
_FILE_STARTS: Final[Mapping[ModelKind, str]] = {
    "flux": "flux",
    "chroma": "chroma",
    "autoencoder": "ae",
    "clip_l": "clip_l",
    "t5xxl": "t5xxl",
}
"""What the names of single files in a repository begin with."""
_STANDARD_NAMES: Final = ("diffusion_pytorch_model.safetensors", "model.safetensors")
_SHARD: Final = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
_INDEX_ENDING: Final = ".safetensors.index.json"
_OTHER_FORMATS: Final[Mapping[str, str]] = {
    ".bin": "pickle files (.bin)",
    ".ckpt": "pickle files (.ckpt)",
    ".pt": "pickle files (.pt)",
    ".pth": "pickle files (.pth)",
    ".gguf": "GGUF files",
    ".msgpack": "Flax files (.msgpack)",
    ".onnx": "ONNX files",
}
# What diffusers and transformers call sizes that shapes don't show, and what our own metadata entry calls them.
_CONFIG_NAMES: Final[Mapping[str, str]] = {
    "axes_dims_rope": "axes_dim",
    "scaling_factor": "scale_factor",
    "shift_factor": "shift_factor",
    "num_attention_heads": "num_attention_heads",
    "layer_norm_eps": "layer_norm_eps",
    "eos_token_id": "eos_token_id",
    "layer_norm_epsilon": "layer_norm_epsilon",
    "relative_attention_max_distance": "relative_attention_max_distance",
}


def read_weights(path: Path, kind: ModelKind) -> Header:
    """The header of the model that `path` names, all its files together; `kind` decides what to take from a folder.

    Raises `UserError` (exit code 3) when nothing is there, files are missing or damaged, or the choice is not clear.
    """
    repo = hub_id(path)
    if repo is not None:
        snapshot = cached_snapshot(repo)
        if snapshot is None:
            raise UserError(
                "this is neither a file or folder on this machine nor a model in the local Hugging Face cache",
                str(path),
                "Check it for a typing error. A hub id (owner/name) is downloaded when training starts.",
            )
        return _given_as(path, _read_folder(snapshot, kind))
    if path.is_dir():
        return _given_as(path, _read_folder(path, kind))
    if path.name.endswith(_INDEX_ENDING):
        return _with_config(_read_index(path))
    if _SHARD.fullmatch(path.name) and path.is_file():
        return _with_config(_read_shards(path))
    header = read_header(path)
    return _with_config(header) if path.name in _STANDARD_NAMES else header


def _given_as(path: Path, header: Header) -> Header:
    """`header` under the name that the user gave."""
    return replace(header, path=path, shards=header.shards or dict.fromkeys(header.tensors, header.path))


def folder_files(names: Iterable[str], kind: ModelKind) -> list[str]:
    """Those of a repository's files (paths relative to it) that a model of `kind` needs; empty when it has none."""
    all_names = list(names)
    for folder in SUBFOLDERS.get(kind, ()):
        below = f"{folder}/"
        inside = [name for name in all_names if name.startswith(below) and "/" not in name[len(below) :]]
        if any(name.endswith(".safetensors") for name in inside):
            return sorted(_without_variants(inside, below))
    root = [name for name in all_names if "/" not in name]
    weights = [name for name in root if name.endswith(".safetensors")]
    chosen = [name for name in weights if name.lower().startswith(_FILE_STARTS.get(kind, "lora"))]
    if not chosen and len(weights) == 1 and not weights[0].lower().startswith(tuple(_FILE_STARTS.values())):
        chosen = weights
    if not chosen and any(name.endswith(_INDEX_ENDING) for name in root):
        chosen = sorted(_without_variants(root, ""))
    return chosen


def _without_variants(names: Sequence[str], below: str) -> list[str]:
    """Weights, index and config; of two storage variants (`model.safetensors`, `model.fp16.safetensors`) the plain one."""
    kept = [name for name in names if name.endswith((".safetensors", ".json"))]
    plain = [name for name in kept if "." not in name[len(below) :].split(".safetensors")[0]]
    has_plain_weights = any(name.endswith(".safetensors") for name in plain)
    return [name for name in kept if name in plain or name.endswith("config.json")] if has_plain_weights else kept


def _read_folder(folder: Path, kind: ModelKind) -> Header:
    for number, name in enumerate(SUBFOLDERS.get(kind, ())):
        below = folder / name
        if not below.is_dir() or not any(below.iterdir()):
            continue
        _check_pipeline(folder)
        header = _read_own_folder(below, kind)
        if number > 0 and identify(header) != kind:
            # A repository of FLUX.1 that is not whole has CLIP-L there.
            raise UserError(
                f"this folder holds no T5 text encoder: {_SECOND_ENCODER} is missing, and {name} holds {noun(header)}",
                str(folder),
                "Download the whole repository, or give the T5 file itself.",
            )
        return header
    return _read_own_folder(folder, kind)


def _check_pipeline(folder: Path) -> None:
    """A whole repository says in model_index.json which family it belongs to."""
    stated = _read_json(folder / "model_index.json").get("_class_name")
    if isinstance(stated, str) and not stated.startswith(("Flux", "Chroma")):
        raise UserError(
            f"this is a diffusers folder of another model ({stated})", str(folder), "Give a FLUX.1 folder or file."
        )
    if isinstance(stated, str) and stated.startswith("Flux2"):
        raise UserError(f"this is a FLUX.2 folder ({stated})", str(folder), "Give a FLUX.1 folder or file.")


def _read_own_folder(folder: Path, kind: ModelKind) -> Header:
    """The model whose files lie directly in `folder`."""
    names = sorted(entry.name for entry in folder.iterdir())
    indices = _plain_first([name for name in names if name.endswith(_INDEX_ENDING)])
    if indices:
        return _with_config(_read_index(folder / indices[0]))
    for name in _STANDARD_NAMES:
        if name in names:
            return _with_config(read_header(folder / name))
    weights = [name for name in names if name.endswith(".safetensors")]
    if not weights:
        raise _no_weights(folder, names)
    shards = [name for name in weights if _SHARD.fullmatch(name)]
    if len(shards) == len(weights):
        return _with_config(_read_shards(folder / shards[0]))
    headers = [read_header(folder / name) for name in weights]
    fitting = headers if len(headers) == 1 else [header for header in headers if identify(header) == kind]
    if len(fitting) == 1:
        return _with_config(fitting[0])
    found = "none of them is" if not fitting else f"{len(fitting)} of them are"
    raise UserError(
        f"this folder holds {len(weights)} .safetensors files, and {found} what is needed here",
        str(folder),
        "Give the file itself.",
    )


def _plain_first(names: Sequence[str]) -> list[str]:
    """The storage variant without a name of its own stands first."""
    return sorted(names, key=lambda name: (name.count("."), name))


def _no_weights(folder: Path, names: Sequence[str]) -> UserError:
    where, hint = str(folder), "Give a .safetensors file, or the folder that holds it."
    if not names:
        return UserError("this folder is empty", where, hint)
    _check_pipeline(folder)
    for ending, text in _OTHER_FORMATS.items():
        if any(name.endswith(ending) for name in names):
            return UserError(f"this folder holds {text} only, which are not loaded", where, hint)
    return UserError(f"this folder holds no .safetensors file (but {names[0]!r})", where, hint)


def _read_index(path: Path) -> Header:
    """All shards that an index file names."""
    index = _read_json(path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(
            "this is not the index of a model's shards: it holds no weight_map", str(path), "Download it again."
        )
    places = {str(name): str(file) for name, file in cast("dict[object, object]", weight_map).items()}
    outside = next((file for file in places.values() if Path(file).name != file or not file), None)
    if outside is not None:
        raise UserError(
            f"this index names a file outside its folder ({outside!r})", str(path), "Download the folder again."
        )
    header = _merged([path.parent / name for name in sorted(set(places.values()))], path)
    lost = [name for name in places if name not in header.tensors]
    if lost:
        raise UserError(
            f"{len(lost)} tensors that the index lists are not in the shards ({lost[0]!r})",
            str(path),
            "Index and shards are of different versions; download the folder again.",
        )
    return header


def _read_shards(path: Path) -> Header:
    """All shards of the set that the shard `path` belongs to."""
    match = _SHARD.fullmatch(path.name)
    if match is None:
        raise AssertionError(f"{path.name} is no shard")
    stem, count = match["stem"], int(match["count"])
    names = [f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    return _merged([path.parent / name for name in names], path)


def _merged(paths: Sequence[Path], where: Path) -> Header:
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise UserError(
            f"{len(missing)} of the model's {len(paths)} shards are missing ({', '.join(missing[:3])})",
            str(where),
            "Download the missing files into the same folder.",
        )
    tensors: dict[str, TensorInfo] = {}
    shards: dict[str, Path] = {}
    metadata: dict[str, str] = {}
    file_bytes = 0
    for path in paths:
        header = read_header(path)
        twice = next((name for name in header.tensors if name in tensors), None)
        if twice is not None:
            raise UserError(
                f"the tensor {twice!r} is in two shards ({shards[twice].name} and {path.name})",
                str(where),
                "Files of two versions are mixed; download the folder again.",
            )
        tensors.update(header.tensors)
        shards.update(dict.fromkeys(header.tensors, path))
        metadata = {**header.metadata, **metadata}
        file_bytes += header.file_bytes
    return Header(where, tensors, metadata, file_bytes, shards)


def _with_config(header: Header) -> Header:
    """`header` with what config.json beside its files says, unless the file says it itself."""
    if "config" in header.metadata:
        return header
    stated = _read_json(header.files[0].parent / "config.json")
    config = {ours: stated[theirs] for theirs, ours in _CONFIG_NAMES.items() if stated.get(theirs) is not None}
    return replace(header, metadata={**header.metadata, "config": json.dumps(config)}) if config else header


def _read_json(path: Path) -> dict[str, object]:
    """The object in a JSON file; empty when there is no such file. Raises `UserError` when it is damaged."""
    try:
        parsed: object = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError):
        raise UserError("this JSON file cannot be read", str(path), "Download it again.") from None
    return cast("dict[str, object]", parsed) if isinstance(parsed, dict) else {}
