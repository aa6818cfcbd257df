"""What the LoRA files of a run tell about it, gathered from its options, data and model files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from trainer.data.items import DatasetSummary, SubsetSummary
from trainer.schema.chroma_header import TransformerParams
from trainer.schema.options import Options
from trainer.schema.storage import stored_as
from trainer.schema.swap_counts import chosen_swap
from trainer.train.check import CheckedRun
from trainer.train.metadata import used_settings
from trainer.train.metadata_facts import DatasetFacts, ModelSpecFacts, SubsetFacts, TrainingFacts
from trainer.train.model_hashes import model_file_facts
from trainer.train.same_named import same_named

TRAINER_VERSION: Final = "0.1.0"


def model_files(options: Options) -> dict[str, Path]:
    """The run's model files by the names that the metadata has for them; FLUX's comes first."""
    files = {
        "flux": options.pretrained_model_name_or_path,
        "ae": options.ae,
        "clip_l": options.clip_l,
        "t5xxl": options.t5xxl,
    }
    return {name: path for name, path in files.items() if path is not None}


def with_hashes(facts: TrainingFacts, hashes: Mapping[str, str]) -> TrainingFacts:
    """The facts with those SHA-256 that are known by now, by the names of `model_files`."""
    others = {name: replace(model, sha256=hashes.get(name)) for name, model in facts.other_models.items()}
    return replace(facts, base_model_sha256=hashes.get("flux"), other_models=others)


def _own_settings(options: Options, flux: TransformerParams, weight_dtype: str) -> dict[str, object]:
    """Settings that decide about the result and that the reference does not record."""
    return {
        "base_storage": stored_as(options, flux),
        "blocks_to_swap": chosen_swap(options.blocks_to_swap),
        "weight_dtype": weight_dtype,
        "full_bf16": options.full_bf16,
        "save_precision": options.save_precision or "float",
        "lora_form": options.lora_form,
        "t5xxl_max_token_length": options.t5xxl_max_token_length,
        "clip_l_activation": options.clip_l_activation,
        "network_train_unet_only": options.network_train_unet_only,
    }


def training_facts(
    checked: CheckedRun,
    *,
    seed: int,
    session_id: int,
    started_at: float,
    optimizer: str,
    num_processes: int,
    weight_dtype: str,
) -> TrainingFacts:
    """What the files of this run say about it. `weight_dtype` is the number format of the frozen models."""
    options, spec, schedule = checked.options, checked.spec, checked.schedule
    models = {name: model_file_facts(path) for name, path in model_files(options).items()}
    flux = models.pop("flux")
    own: dict[str, Any] = {
        "session_id": session_id,
        "started_at": started_at,
        "trainer_version": TRAINER_VERSION,
        "num_batches_per_epoch": schedule.micro_steps_per_epoch * num_processes,
        "num_epochs": schedule.num_epochs,
        "max_train_steps": schedule.num_steps,
        "num_processes": num_processes,
        "optimizer": optimizer,
        "network_dim": spec.rank,
        "network_alpha": spec.alpha,
        "network_args": _pairs(options.network_args),
        "seed": seed,
        "datasets": tuple(_dataset_facts(summary, checked) for summary in checked.index.datasets),
        "uses_dataset_config": options.dataset_config is not None,
        "network_module": options.network_module or "networks.lora_flux",
        "is_schnell": checked.flux.is_schnell,
        "base_model_name": flux.name,
        "base_model_legacy_hash": flux.legacy_hash,
        "settings": {
            **used_settings(options),
            "ss_fp8_base": stored_as(options) == "fp8",
            "ss_num_validation_images": len(checked.index.validation),
        },
        "other_models": models,
        "own": _own_settings(options, checked.flux, weight_dtype),
        "modelspec": ModelSpecFacts(**same_named(ModelSpecFacts, options, prefix="metadata_")),
    }
    return TrainingFacts(**{**same_named(TrainingFacts, options), **own})


def _pairs(network_args: tuple[str, ...] | None) -> dict[str, str] | None:
    if network_args is None:
        return None
    pairs = (pair.partition("=") for pair in network_args)
    return {key.strip(): value.strip() for key, _, value in pairs}


def _dataset_facts(summary: DatasetSummary, checked: CheckedRun) -> DatasetFacts:
    own: dict[str, Any] = {
        "subsets": tuple(_subset_facts(subset, checked) for subset in summary.subsets),
        "buckets": tuple(summary.bucket_counts.items()),
        "mean_aspect_error": summary.mean_aspect_error,
        "resize_interpolation": checked.options.resize_interpolation,
    }
    return DatasetFacts(**{**same_named(DatasetFacts, summary.spec), **own})


def _subset_facts(summary: SubsetSummary, checked: CheckedRun) -> SubsetFacts:
    spec = summary.spec
    own: dict[str, Any] = {
        "place": spec.place if spec.metadata_file is None else spec.metadata_file,
        "is_listed": spec.metadata_file is not None,
        "captions": tuple(item.caption for item in checked.index.items if item.subset is spec),
    }
    return SubsetFacts(**{**same_named(SubsetFacts, spec), **own})
