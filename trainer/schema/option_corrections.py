"""Old names and implied settings carried over, and settings without effect beside others: a line for each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from trainer.schema.idle_options import idle_options
from trainer.schema.network_rules import network_advice
from trainer.schema.optimizer_rules import optimizer_advice, optimizer_corrections
from trainer.schema.option_rules import needs_huber_schedule
from trainer.schema.options import Options
from trainer.schema.storage import stored_as


def corrected(options: Options, explicit: frozenset[str]) -> tuple[Options, list[str]]:
    """The options with old names and implied settings carried over, and a line for each change."""
    changes: dict[str, object] = {}
    notes: list[str] = []

    def change(note: str, **values: object) -> None:
        changes.update(values)
        notes.append(note)

    if options.network_module is None:
        change("network_module is not given: networks.lora_flux is used", network_module="networks.lora_flux")
    elif options.network_module == "networks.lora":
        change(
            "networks.lora is taken for FLUX's LoRA; its name is networks.lora_flux",
            network_module="networks.lora_flux",
        )
    for note, values in optimizer_corrections(options, explicit):
        change(note, **values)
    if needs_huber_schedule(options) and options.huber_schedule == "snr":
        # Of the two that exist for FLUX it is the one with snr's form: from 1 without noise down to huber_c.
        change(
            f"huber_schedule is exponential: the default, snr, does not exist for FLUX (loss_type {options.loss_type})",
            huber_schedule="exponential",
        )
    if options.fp8_base_unet and not options.fp8_base:
        change("fp8_base_unet turns fp8_base on", fp8_base=True)
    if options.split_mode:
        swap = 18 if options.blocks_to_swap in (None, 0) else options.blocks_to_swap
        change(f"split_mode is an old name: blocks_to_swap is {swap}", split_mode=False, blocks_to_swap=swap)
    if options.model_type == "chroma":
        for note, values in _chroma_settings(options, explicit):
            change(note, **values)
    if options.cache_latents_to_disk and not options.cache_latents:
        change("cache_latents_to_disk turns cache_latents on", cache_latents=True)
    if options.cache_text_encoder_outputs_to_disk and not options.cache_text_encoder_outputs:
        change(
            "cache_text_encoder_outputs_to_disk turns cache_text_encoder_outputs on", cache_text_encoder_outputs=True
        )
    extension = options.caption_extension
    if options.caption_extention is not None:
        extension = options.caption_extention
        change("caption_extention is an old name of caption_extension", caption_extention=None)
    if not extension.startswith("."):
        extension = f".{extension}"
    changes["caption_extension"] = extension
    for name, value in (
        ("sample_every_n_steps", options.sample_every_n_steps),
        ("sample_every_n_epochs", options.sample_every_n_epochs),
    ):
        if value is not None and value <= 0:
            change(f"{name} {value} means no samples", **{name: None})
    return options.model_copy(update=changes), notes


def _chroma_settings(options: Options, explicit: frozenset[str]) -> Iterator[tuple[str, dict[str, object]]]:
    """What Chroma leaves no choice about: a line for each, and the setting."""
    if options.clip_l is not None:
        yield "clip_l has no effect: Chroma has no CLIP-L", {"clip_l": None}
    if not options.network_train_unet_only:
        yield "Chroma has no CLIP-L: only the transformer is trained", {"network_train_unet_only": True}
    if not options.apply_t5_attn_mask:
        yield "Chroma always masks T5's padding: apply_t5_attn_mask is on", {"apply_t5_attn_mask": True}
    if "guidance_scale" not in explicit:
        yield "guidance_scale is 0, with which Chroma was made", {"guidance_scale": 0.0}


def option_advice(options: Options, explicit: frozenset[str]) -> Iterable[str]:
    """One line for each setting that has no effect beside others."""
    if options.dataset_config is not None:
        for name in ("train_data_dir", "reg_data_dir", "in_json"):
            if name in explicit and getattr(options, name) is not None:
                yield f"{name} has no effect beside dataset_config"
    elif options.in_json is not None and options.reg_data_dir is not None:
        yield "reg_data_dir has no effect beside in_json"
    if {"max_train_epochs", "max_train_steps"} <= explicit and options.max_train_epochs is not None:
        yield f"max_train_steps has no effect: max_train_epochs {options.max_train_epochs} wins"
    every_epochs, every_steps = options.sample_every_n_epochs, options.sample_every_n_steps
    if every_epochs is not None and every_steps is not None:
        yield "sample_every_n_steps has no effect: sample_every_n_epochs wins"
    if options.sample_prompts is None and (every_epochs or every_steps or options.sample_at_first):
        yield "no samples are made: sample_prompts is not given"
    caches_text = options.cache_text_encoder_outputs or options.cache_text_encoder_outputs_to_disk
    if "caption_variants" in explicit and not caches_text:
        yield "caption_variants has no effect: without cache_text_encoder_outputs every step encodes its own texts"
    if options.write_reference_caches:
        if not (options.cache_latents_to_disk or options.cache_text_encoder_outputs_to_disk):
            yield "write_reference_caches has no effect: nothing is kept on disk (cache_latents_to_disk, ...)"
        elif options.model_type == "chroma" and options.cache_text_encoder_outputs_to_disk:
            yield "write_reference_caches writes no text: there is no such file for Chroma"
    if options.base_storage_cache is not None and stored_as(options) == "compute":
        yield "base_storage_cache has no effect: the model is stored as computed (base_storage, fp8_base)"
    for name in ("checkpoint_blocks", "cpu_offload_checkpointing"):
        if getattr(options, name) and not options.gradient_checkpointing:
            yield f"{name} has no effect: gradient_checkpointing is off"
    if options.offload_modulation is not None and options.model_type == "chroma":
        yield "offload_modulation has no effect: Chroma's blocks have no modulation weights"
    if "dynamo_backend" in explicit and not options.torch_compile and options.dynamo_backend != "no":
        yield "dynamo_backend has no effect: torch_compile is not given"
    if options.torch_compile and options.dynamo_backend == "no":
        yield "torch_compile has no effect: dynamo_backend is no"
    if options.model_type == "chroma" and options.guidance_scale != 0:
        yield f"guidance_scale is {options.guidance_scale:g}; Chroma was made with 0"
    if options.huggingface_repo_id is None:
        for name in ("repo_type", "path_in_repo", "token", "repo_visibility"):
            is_for_resuming = name == "token" and options.resume_from_huggingface
            if getattr(options, f"huggingface_{name}") is not None and not is_for_resuming:
                yield f"huggingface_{name} has no effect: huggingface_repo_id is not given"
        for name in ("save_state_to_huggingface", "async_upload"):
            if getattr(options, name):
                yield f"{name} has no effect: huggingface_repo_id is not given"
    elif options.save_state_to_huggingface and not (options.save_state or options.save_state_on_train_end):
        yield "save_state_to_huggingface has no effect: no states are saved (save_state, save_state_on_train_end)"
    if options.resume_from_huggingface and options.resume is None:
        yield "resume_from_huggingface has no effect: resume is not given"
    if options.log_with not in ("wandb", "all"):
        for name in ("wandb_run_name", "wandb_api_key"):
            if getattr(options, name) is not None:
                yield f"{name} has no effect: log_with is not wandb"
    if options.log_with is None and options.logging_dir is None and (options.log_config or options.log_tracker_config):
        yield "log_config and log_tracker_config have no effect: there is no tracker (log_with, logging_dir)"
    yield from idle_options(options, explicit)
    yield from network_advice(options, explicit)
    yield from optimizer_advice(options, explicit)
