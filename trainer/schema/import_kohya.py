"""The settings file (JSON) of kohya_ss's LoRA page as options of the trainer.

The page has its own names for some options and leaves out what is at its zero. The mapping follows its `train_model`
(bmaltais/kohya_ss, `kohya_gui/lora_gui.py`), which writes the options file that its trainer is started with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, cast

RENAMED: Final[Mapping[str, str]] = {
    "optimizer": "optimizer_type",
    "max_resolution": "resolution",
    "flux1_cache_text_encoder_outputs": "cache_text_encoder_outputs",
    "flux1_cache_text_encoder_outputs_to_disk": "cache_text_encoder_outputs_to_disk",
    "flux1_clip_l": "clip_l",
    "flux1_t5xxl": "t5xxl",
    "lora_network_weights": "network_weights",
}
"""Its name of an option -> the trainer's."""

_WORD_LISTS: Final = ("optimizer_args", "lr_scheduler_args", "network_args")
_FLUX_NETWORK: Final = (
    *("img_attn_dim", "img_mlp_dim", "img_mod_dim", "single_dim", "txt_attn_dim", "txt_mlp_dim", "txt_mod_dim"),
    *("single_mod_dim", "in_dims", "train_double_block_indices", "train_single_block_indices"),
)
_GGPO: Final = ("ggpo_beta", "ggpo_sigma")
_LORAPLUS: Final = ("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio")
_LAUNCHER: Final = (
    *("num_processes", "num_machines", "num_cpu_threads_per_process", "multi_gpu", "gpu_ids", "main_process_port"),
    *("dynamo_mode", "dynamo_use_dynamic", "dynamo_use_fullgraph", "extra_accelerate_launch_args"),
)
# What its page keeps for other networks, other models and itself; a FLUX.1 LoRA is not touched by it.
_WITHOUT_MEANING: Final = frozenset(
    {
        *("LyCORIS_preset", "block_alphas", "block_dims", "block_lr_zero_threshold", "bypass_mode", "constrain"),
        *("conv_alpha", "conv_block_alphas", "conv_block_dims", "conv_dim", "decompose_both", "dora_wd", "factor"),
        *("down_lr_weight", "mid_lr_weight", "up_lr_weight", "rescaled", "train_norm", "train_on_input", "unit"),
        *("use_cp", "use_scalar", "use_tucker", "rank_dropout_scale", "model_list", "save_as_bool", "sdxl"),
        *("sdxl_cache_text_encoder_outputs", "sdxl_no_half_vae", "flux1_checkbox", "enable_all_linear", "lowvram"),
        *("train_blocks", "noise_offset_type", "lr_warmup", "epoch", "LoRA_type", "t5xxl_lr", "mem_eff_save"),
        *("train_lora_ggpo", "split_qkv", "train_t5xxl", "single_blocks_to_swap", "double_blocks_to_swap"),
        *("save_clip", "save_t5xxl", "t5xxl_device", "t5xxl_dtype", "clip_g", "clip_g_dropout_rate"),
        *("logit_mean", "logit_std", "mode_scale", "weighting_scheme", "enable_scaled_pos_embed"),
        *("pos_emb_random_crop_rate", "text_encoder_batch_size", "lr_warmup_steps", "stop_text_encoder_training"),
        *("rank_dropout", "module_dropout", "max_token_length", "max_data_loader_n_workers"),
        *_FLUX_NETWORK,
        *_GGPO,
        *_LORAPLUS,
        *_LAUNCHER,
        *_WORD_LISTS,
    }
)
_MODULES: Final[Mapping[str, str]] = {"Flux1": "networks.lora_flux", "Flux1 OFT": "networks.oft_flux"}


class KohyaSettings:
    """What a settings file says: `values` by name of the trainer's option, or by its own name where there is none.

    `prompts` are the sample prompts that the file holds as text, `changed` and `left_out` one line for each thing that
    was turned into something else or has no place here, and `additional` its line of further options.
    """

    def __init__(self, settings: Mapping[str, object]) -> None:
        self._settings = settings
        self.values: dict[str, object] = {}
        self.changed: list[str] = []
        self.left_out: list[str] = []
        self.prompts: str | None = None
        self.additional = self._text("additional_parameters")
        self._plain()
        self._network()
        self._length()
        self._rates()
        self._other_models()

    def _text(self, name: str) -> str:
        value = self._settings.get(name)
        return "" if value is None else str(value).strip()

    def _number(self, name: str) -> float:
        try:
            return float(str(self._settings.get(name) or 0))
        except ValueError:
            return 0.0

    def _is_on(self, name: str) -> bool:
        return self._settings.get(name) in (True, 1, "true", "True")

    def _plain(self) -> None:
        """Everything that is one of the trainer's options under its own or another name."""
        own = {
            "additional_parameters",
            "sample_prompts",
            "xformers",
            "text_encoder_lr",
            "persistent_data_loader_workers",
        }
        for key, value in self._settings.items():
            # Every 0 is left out too, as its page does.
            if key in _WITHOUT_MEANING or key in own or value in ("", None, [], False):
                continue
            name = RENAMED.get(key, key)
            if name != key:
                self.changed.append(f"{key} is called {name} here")
            self.values[name] = value
        if self._text("max_data_loader_n_workers"):
            self.values["max_data_loader_n_workers"] = int(self._number("max_data_loader_n_workers"))
        if self._is_on("persistent_data_loader_workers"):
            self.values["persistent_data_loader_workers"] = True
        attention = self._text("xformers")
        if attention in ("sdpa", "xformers"):
            self.values[attention] = True
        for name in ("optimizer_args", "lr_scheduler_args"):
            words = self._text(name).strip("[]").replace('"', "").split()
            if words:
                self.values[name] = words
        noise = self._text("noise_offset_type") or "Original"
        wrong = ("multires_noise_discount", "multires_noise_iterations") if noise == "Original" else ()
        wrong = wrong or ("noise_offset", "noise_offset_random_strength", "adaptive_noise_scale")
        for name in wrong:
            self.values.pop(name, None)
        prompts = self._text("sample_prompts")
        if prompts:
            self.prompts = prompts

    def _network(self) -> None:
        kind = self._text("LoRA_type") or "Flux1"
        arguments: list[str] = []
        if kind in _MODULES:
            self.values["network_module"] = _MODULES[kind]
        elif kind.startswith("LyCORIS/"):
            self.values["network_module"] = "lycoris.kohya"
            self.left_out.append(
                f"LoRA_type {kind}: its settings (preset, conv_dim, factor, ...) are not taken over; give them as network_args"
            )
        else:
            self.values["network_module"] = "networks.lora_flux"
            self.changed.append(f"LoRA_type {kind} is for other models: networks.lora_flux is used")
        if kind == "Flux1":
            names = (*_FLUX_NETWORK, *(_GGPO if self._is_on("train_lora_ggpo") else ()))
            arguments += [f"{name}={self._text(name)}" for name in names if self._text(name) not in ("", "0")]
            if self._is_on("split_mode"):
                arguments.append("train_blocks=single")
            arguments += [f"{name}=True" for name in ("split_qkv", "train_t5xxl") if self._is_on(name)]
        elif kind == "Flux1 OFT" and self._is_on("enable_all_linear"):
            arguments.append("enable_all_linear=True")
        if arguments:
            self.values["network_args"] = arguments
        for name in ("rank_dropout", "module_dropout"):
            if self._number(name):
                self.left_out.append(f"{name}: its page does not pass it on for FLUX.1; network_args takes it")
        for name in _LORAPLUS:
            if self._number(name):
                self.left_out.append(f"{name}: the trainer does not read it there; write it into network_args")
        if self._text("train_blocks") not in ("", "all") and not self._is_on("split_mode"):
            self.left_out.append("train_blocks: its page does not pass it on; network_args takes it")

    def _length(self) -> None:
        epoch = self._number("epoch")
        if epoch and "max_train_steps" not in self.values and "max_train_epochs" not in self.values:
            self.values["max_train_epochs"] = int(epoch)
            self.changed.append(f"epoch {int(epoch)} gives the length: max_train_epochs is {int(epoch)}")
        elif epoch:
            self.changed.append(
                f"epoch {int(epoch)}: max_train_steps or max_train_epochs is given, which wins there too"
            )
        steps, share = self._number("lr_warmup_steps"), self._number("lr_warmup")
        if steps:
            self.values["lr_warmup_steps"] = int(steps)
        elif share:
            self.values["lr_warmup_steps"] = share / 100
            self.changed.append(f"lr_warmup {share:g} % is lr_warmup_steps {share / 100:g}")

    def _rates(self) -> None:
        text, t5 = self._number("text_encoder_lr"), self._number("t5xxl_lr")
        unet = self._number("unet_lr")
        if text:
            self.values["text_encoder_lr"] = [text, t5 or text]
        if text and not unet:
            self.values["network_train_text_encoder_only"] = True
            self.changed.append("no unet_lr: only the text encoder is trained, as its page does")
        elif unet and not text:
            self.values["network_train_unet_only"] = True
            self.changed.append("no text_encoder_lr: only the transformer is trained, as its page does")

    def _other_models(self) -> None:
        for name in ("sdxl", "sd3_checkbox", "v2"):
            if self._is_on(name):
                self.left_out.append(f"{name}: these are settings for another model; FLUX.1 is trained here")
        self.values.pop("sd3_checkbox", None)
        for name in [name for name in self.values if name.startswith("sd3_")]:
            del self.values[name]
        devices = self._number("num_processes") > 1 or self._is_on("multi_gpu") or self._text("gpu_ids")
        if devices:
            self.left_out.append(
                "several devices: this page trains on one; accelerate launch takes the exported command"
            )
        if self._text("extra_accelerate_launch_args"):
            self.left_out.append(f"extra_accelerate_launch_args {self._text('extra_accelerate_launch_args')}")
        for name in ("single_blocks_to_swap", "double_blocks_to_swap"):
            if self._number(name):
                self.left_out.append(f"{name}: an older way; give blocks_to_swap")
        if self._number("stop_text_encoder_training"):
            self.left_out.append("stop_text_encoder_training: the trainer has no such option")


def is_kohya_settings(table: Mapping[str, object]) -> bool:
    """Whether a JSON table is a settings file of that page, by the names that nothing else uses."""
    return len({"LoRA_type", "max_resolution", "flux1_checkbox", "optimizer", "lr_warmup"} & set(table)) >= 2


def as_table(value: object) -> dict[str, object] | None:
    return cast("dict[str, object]", value) if isinstance(value, dict) else None
