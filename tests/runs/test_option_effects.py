"""Every supported option changes something that a user can see: two real, very short trainings, without it and with it.

A newly supported option needs an entry here. What is compared is named: the trained weights, the files, the metadata,
the lines, the exit code, or how often a module was called.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
from collections import Counter
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from tests.runs.in_process import answer, small_run
from tests.tiny import TinyModels
from trainer.schema.cli import read_command_line
from trainer.schema.option_status import STATUS
from trainer.tools.tiny_models import make_autoencoder, make_clip_l, make_t5xxl

pytestmark = pytest.mark.timeout(300)


@dataclass(frozen=True)
class Effect:
    """What giving an option changes: `part` of a `Trace`, with `beside` in both runs.

    `given` is the option's value; for a switch it is empty. A part "metadata:KEY" is one entry of the LoRA's file.
    """

    part: str
    given: str = ""
    beside: tuple[str, ...] = ()
    without: tuple[str, ...] = ()


@dataclass(frozen=True)
class Trace:
    """What is left of a run."""

    code: int
    weights: str
    tensors: tuple[str, ...]
    files: tuple[str, ...]
    metadata: dict[str, str]
    lines: tuple[str, ...]
    output: str
    calls: Counter[str]

    def part(self, name: str) -> object:
        if name.startswith("metadata:"):
            return self.metadata.get(name.removeprefix("metadata:"))
        return getattr(self, name)


def e(part: str, given: str = "", *beside: str, without: tuple[str, ...] = ()) -> Effect:
    return Effect(part, given, beside, without)


# Words may name files of the workshop: {other}/ae.safetensors and so on.
SAMPLES = ("--sample_prompts={prompts}",)
STATES = ("--save_state", "--save_every_n_steps=1")
EPOCH_STATES = ("--save_state", "--save_every_n_epochs=1", "--max_train_epochs=3")
SHUFFLED = ("--shuffle_caption",)
HUBER = ("--loss_type=huber", "--huber_schedule=constant")
BF16 = ("--mixed_precision=bf16",)
TEXT = ("--cache_text_encoder_outputs",)
FOLDERS = ("--train_data_dir={folders}", "--resolution=64")
BIG_FOLDERS = ("--train_data_dir={more}", "--resolution=64")
LOGS = ("--logging_dir={out}/logs",)

EFFECTS: dict[str, Effect] = {
    # ---- model
    "pretrained_model_name_or_path": e("weights", "{models}/flux_schnell.safetensors"),
    "clip_l": e("weights", "{other}/clip_l.safetensors"),
    "t5xxl": e("weights", "{other}/t5xxl.safetensors"),
    "ae": e("weights", "{other}/ae.safetensors"),
    "model_type": e("code", "chroma"),
    "tokenizer_cache_dir": e("weights", "{kept}", without=("clip_l_tokenizer", "t5xxl_tokenizer")),
    "clip_l_tokenizer": e("weights", "{other}/clip_tokenizer.json"),
    "t5xxl_tokenizer": e("weights", "{other}/t5_tokenizer.json"),
    "clip_l_activation": e("weights", "gelu"),
    "t5xxl_max_token_length": e("weights", "4"),
    "apply_t5_attn_mask": e("weights", "", "--t5xxl_max_token_length=64"),
    "guidance_scale": e("weights", "1"),
    # ---- dataset
    "dataset_config": e("code", "{dataset}", without=("dataset_config",)),
    "train_data_dir": e("code", "{folders}", "--resolution=64", without=("dataset_config",)),
    "reg_data_dir": e("lines", "{regularisation}", *FOLDERS, without=("dataset_config",)),
    "in_json": e("code", "{metadata}", "--train_data_dir={images}", "--resolution=64", without=("dataset_config",)),
    "dataset_repeats": e("lines", "3"),
    "resolution": e("weights", "96"),
    "train_batch_size": e("lines", "2"),
    "enable_bucket": e("lines", "", "--min_bucket_reso=32"),
    "min_bucket_reso": e("lines", "64", "--enable_bucket", "--bucket_reso_steps=16", "--min_bucket_reso=16"),
    "max_bucket_reso": e("lines", "64", "--enable_bucket", "--bucket_reso_steps=16", "--min_bucket_reso=16"),
    "bucket_reso_steps": e("lines", "16", "--enable_bucket", "--min_bucket_reso=32"),
    "bucket_no_upscale": e("lines", "", "--enable_bucket", "--bucket_reso_steps=16", "--resolution=256"),
    "resize_interpolation": e("weights", "nearest"),
    "caption_extension": e("weights", ".words"),
    "caption_extention": e("weights", ".words"),
    "caption_separator": e("weights", ";", *SHUFFLED),
    "caption_prefix": e("weights", "red circle"),
    "caption_suffix": e("weights", "red circle"),
    "shuffle_caption": e("weights"),
    "keep_tokens": e("weights", "3", *SHUFFLED),
    "keep_tokens_separator": e("weights", "|||", *SHUFFLED),
    "secondary_separator": e("weights", ";;;"),
    "enable_wildcard": e("weights"),
    "caption_dropout_rate": e("weights", "1"),
    "caption_tag_dropout_rate": e("weights", "0.99"),
    "caption_dropout_every_n_epochs": e("weights", "1"),
    "token_warmup_step": e("weights", "100"),
    "token_warmup_min": e("weights", "3", "--token_warmup_step=100"),
    "flip_aug": e("weights", "", "--max_train_steps=8"),
    "random_crop": e("weights"),
    "color_aug": e("weights"),
    "face_crop_aug_range": e("weights", "1.0,1.5"),
    "alpha_mask": e("weights"),
    "masked_loss": e("code", "", "--dataset_config={masked}"),
    "masked_loss_normalize": e("weights", "", "--masked_loss", "--dataset_config={masked}"),
    "debug_dataset": e("lines"),
    # ---- network
    "network_module": e("tensors", "networks.oft_flux", "--network_args", without=("network_module",)),
    "network_dim": e("weights", "2"),
    "network_alpha": e("weights", "2"),
    "network_dropout": e("weights", "0.5"),
    "network_args": e("tensors", "train_blocks=double"),
    "network_weights": e("weights", "{lora}"),
    "dim_from_weights": e("code", "", "--network_weights={lora}", "--network_dim=2"),
    "scale_weight_norms": e("weights", "0.001"),
    "base_weights": e("weights", "{lora}"),
    "base_weights_multiplier": e("weights", "3", "--base_weights={lora}"),
    "network_train_text_encoder_only": e("tensors", "", "--network_args", without=("network_train_unet_only",)),
    "network_train_unet_only": e("tensors", without=("network_train_unet_only",)),
    # ---- course
    "max_train_epochs": e("lines", "2"),
    "max_train_steps": e("lines", "1"),
    "gradient_accumulation_steps": e("weights", "2"),
    "initial_epoch": e("lines", "2", "--max_train_steps=4"),
    "initial_step": e("lines", "1", "--max_train_steps=4"),
    "seed": e("weights", "2"),
    # ---- optimizer
    "learning_rate": e("weights", "0.02"),
    "unet_lr": e("weights", "0.02"),
    "text_encoder_lr": e("weights", "0.02", without=("network_train_unet_only",)),
    "optimizer_type": e("metadata:ss_optimizer", "AdamW8bit"),
    "use_8bit_adam": e("metadata:ss_optimizer"),
    "use_lion_optimizer": e("metadata:ss_optimizer"),
    "optimizer_args": e("weights", "weight_decay=0.5"),
    "max_grad_norm": e("weights", "0.000001"),
    "lr_scheduler": e("weights", "cosine"),
    "lr_scheduler_type": e("code", "CosineAnnealingLR", "--lr_scheduler_args=T_max=2"),
    "lr_scheduler_args": e("code", "T_max=2", "--lr_scheduler_type=CosineAnnealingLR"),
    "lr_warmup_steps": e("weights", "2", "--lr_scheduler=constant_with_warmup"),
    "lr_decay_steps": e("weights", "2", "--lr_scheduler=warmup_stable_decay"),
    "lr_scheduler_num_cycles": e("weights", "3", "--lr_scheduler=cosine_with_restarts", "--max_train_steps=4"),
    "lr_scheduler_power": e("weights", "3", "--lr_scheduler=polynomial"),
    "lr_scheduler_timescale": e("weights", "1", "--lr_scheduler=inverse_sqrt", "--max_train_steps=4"),
    "lr_scheduler_min_lr_ratio": e("code", "0.9", "--lr_scheduler=cosine_with_min_lr"),
    # ---- flow
    "timestep_sampling": e("weights", "sigmoid"),
    "sigmoid_scale": e("weights", "3", "--timestep_sampling=sigmoid"),
    "discrete_flow_shift": e("weights", "1", "--timestep_sampling=shift"),
    "weighting_scheme": e("weights", "logit_normal"),
    "logit_mean": e("weights", "1", "--weighting_scheme=logit_normal"),
    "logit_std": e("weights", "0.1", "--weighting_scheme=logit_normal"),
    "mode_scale": e("weights", "0.1", "--weighting_scheme=mode"),
    "model_prediction_type": e("weights", "raw"),
    "min_timestep": e("weights", "900"),
    "max_timestep": e("weights", "100"),
    "round_timesteps": e("weights", "", *BF16),
    "loss_type": e("weights", "l1"),
    "huber_schedule": e("weights", "exponential", "--loss_type=huber", "--huber_schedule=constant"),
    "huber_c": e("weights", "0.9", *HUBER),
    "huber_scale": e("weights", "9", *HUBER),
    "prior_loss_weight": e(
        "weights",
        "0.1",
        "--reg_data_dir={regularisation}",
        *FOLDERS,
        "--max_train_epochs=1",
        without=("dataset_config",),
    ),
    "ip_noise_gamma": e("weights", "0.5"),
    "ip_noise_gamma_random_strength": e("weights", "", "--ip_noise_gamma=0.5"),
    # ---- memory
    "device": e("code", "mps"),
    "mixed_precision": e("weights", "bf16"),
    "full_bf16": e("tensors", "", *BF16),
    "full_fp16": e("metadata:ss_full_fp16", "", "--mixed_precision=fp16"),
    "base_storage": e("weights", "nf4"),
    "base_storage_cache": e("files", "{out}/stored", "--base_storage=int8"),
    "fp8_base": e("weights", "", *BF16),
    "fp8_base_unet": e("weights", "", *BF16),
    "no_half_vae": e("weights", "", *BF16),
    "gradient_checkpointing": e("calls"),
    "checkpoint_blocks": e("calls", "1", "--gradient_checkpointing"),
    "cpu_offload_checkpointing": e("lines", "", "--gradient_checkpointing"),
    "offload_modulation": e("calls", "host"),
    "torch_compile": e("lines", "", "--dynamo_backend=eager"),
    "blocks_to_swap": e("lines", "2"),
    "split_mode": e("code"),
    # ---- cache
    "cache_latents": e("calls", "", "--max_train_epochs=3"),
    "cache_latents_to_disk": e("files"),
    "vae_batch_size": e("calls", "2", "--cache_latents"),
    "cache_text_encoder_outputs": e("calls", "", "--max_train_epochs=3"),
    "cache_text_encoder_outputs_to_disk": e("files"),
    "caption_variants": e("lines", "2", *TEXT, *SHUFFLED),
    "text_encoder_batch_size": e("calls", "2", *TEXT),
    "write_reference_caches": e("files", "", "--cache_latents_to_disk"),
    # ---- validation
    "validation_split": e("lines", "0.5"),
    "validation_seed": e("lines", "9", "--validation_split=0.5", "--max_train_epochs=1"),
    "validate_every_n_steps": e("lines", "1", "--validation_split=0.5"),
    "validate_every_n_epochs": e("calls", "2", "--validation_split=0.5", "--max_train_epochs=3"),
    "max_validation_steps": e(
        "calls", "1", "--validation_split=0.6", "--validate_every_n_steps=1", *BIG_FOLDERS, without=("dataset_config",)
    ),
    # ---- saving
    "output_dir": e("files", "{out}/elsewhere"),
    "output_name": e("files", "mine"),
    "save_model_as": e("code", "ckpt"),
    "lora_form": e("tensors", "diffusers"),
    "save_precision": e("tensors", "bf16"),
    "save_every_n_epochs": e("files", "1", "--max_train_epochs=3"),
    "save_every_n_steps": e("files", "1"),
    "save_n_epoch_ratio": e("files", "3", "--max_train_epochs=3"),
    "save_last_n_epochs": e("files", "1", "--save_every_n_epochs=1", "--max_train_epochs=4"),
    "save_last_n_steps": e("files", "1", "--save_every_n_steps=1", "--max_train_steps=4"),
    "save_state": e("files", "", "--save_every_n_steps=1"),
    "save_state_on_train_end": e("files"),
    "save_last_n_epochs_state": e("files", "1", *EPOCH_STATES),
    "save_last_n_steps_state": e("files", "1", *STATES, "--max_train_steps=4"),
    "resume": e("lines", "{state}", "--max_train_steps=4"),
    "config_file": e("weights", "{config}"),
    "output_config": e("code", "", "--config_file={out}/written"),
    "run_dir": e("files", "{out}/run", *SAMPLES, "--sample_at_first"),
    # ---- samples
    "sample_prompts": e("files", "{prompts}", "--sample_at_first"),
    "sample_every_n_steps": e("files", "1", *SAMPLES),
    "sample_every_n_epochs": e("files", "1", *SAMPLES),
    "sample_at_first": e("files", "", *SAMPLES),
    # ---- logs
    "console_log_level": e("lines", "ERROR"),
    "console_log_file": e("files", "{out}/console.log"),
    "console_log_simple": e("lines"),
    "logging_dir": e("files", "{out}/logs"),
    "log_with": e("code", "tensorboard"),
    "log_prefix": e("files", "before-", *LOGS),
    "log_tracker_name": e("files", "mine", *LOGS),
    "log_config": e("files", "", *LOGS),
    "log_tracker_config": e("code", "/nowhere.toml", *LOGS),
    # ---- metadata
    "no_metadata": e("metadata:ss_seed"),
    "training_comment": e("metadata:ss_training_comment", "hello"),
    "metadata_title": e("metadata:modelspec.title", "hello"),
    "metadata_author": e("metadata:modelspec.author", "hello"),
    "metadata_description": e("metadata:modelspec.description", "hello"),
    "metadata_license": e("metadata:modelspec.license", "hello"),
    "metadata_tags": e("metadata:modelspec.tags", "hello"),
    "metadata_usage_hint": e("metadata:modelspec.usage_hint", "hello"),
    "metadata_thumbnail": e("metadata:modelspec.thumbnail", "data:image/png;base64,AAAA"),
    "metadata_merged_from": e("metadata:modelspec.merged_from", "hello"),
    "metadata_trigger_phrase": e("metadata:modelspec.trigger_phrase", "hello"),
    "metadata_preprocessor": e("metadata:modelspec.preprocessor", "hello"),
    "metadata_is_negative_embedding": e("metadata:modelspec.is_negative_embedding", "hello"),
}
SHOWN_ELSEWHERE = {
    "huggingface_repo_id": "tests/train/test_hub_upload.py",
    "huggingface_repo_type": "tests/train/test_hub_upload.py",
    "huggingface_path_in_repo": "tests/train/test_hub_upload.py",
    "huggingface_token": "tests/train/test_hub_upload.py",
    "huggingface_repo_visibility": "tests/train/test_hub_upload.py",
    "save_state_to_huggingface": "tests/train/test_hub_state.py",
    "resume_from_huggingface": "tests/train/test_hub_state.py",
    "max_data_loader_n_workers": "tests/train/test_reading_ahead.py",
    "skip_cache_check": "tests/data/test_cache.py",
    "dynamo_backend": "tests/offload/test_levers.py",
    "ddp_timeout": "tests/train/test_engine.py",
    "no_oom_recovery": "tests/runs/test_out_of_memory.py",
    "async_upload": "tests/train/test_hub_upload.py",
    "wandb_run_name": "tests/train/test_trackers.py",
    "wandb_api_key": "tests/train/test_trackers.py",
}
"""Options whose effect is outside of this machine or in no result, and the test that shows it."""

SUPPORTED = [name for name, status in STATUS.items() if status.status == "supported"]


def test_every_supported_option_has_an_entry() -> None:
    assert [name for name in SUPPORTED if name not in EFFECTS and name not in SHOWN_ELSEWHERE] == []


def test_every_entry_is_tried() -> None:
    """An entry of an option that is inert or refused would never run."""
    assert [name for name in EFFECTS if name not in SUPPORTED] == []


@pytest.mark.parametrize("name", EFFECTS)
def test_no_option_with_an_effect_is_called_without(name: str) -> None:
    effect = EFFECTS[name]
    option = f"--{name}={effect.given}" if effect.given else f"--{name}"
    notes = read_command_line([*effect.beside, option]).notes
    assert [note for note in notes if note.startswith(f"{name} has no effect")] == []


def test_an_entry_elsewhere_names_a_test_of_that_option() -> None:
    root = Path(__file__).parents[2]
    for name in SUPPORTED:
        if name in SHOWN_ELSEWHERE:
            assert name in (root / SHOWN_ELSEWHERE[name]).read_text(encoding="utf-8"), name


class Workshop:
    """Files that options name, and the traces of runs that were made before."""

    def __init__(self, models: TinyModels, folder: Path) -> None:
        self._models = models
        self._folder = folder
        self._traces: dict[tuple[str, ...], Trace] = {}
        self._count = 0
        self._base = small_run(models, folder / "dataset.toml", folder) | {
            "max_train_steps": "2",
            "seed": "1",
            "learning_rate": "0.01",
            "network_dim": "4",
            "network_alpha": "4",
            "network_args": "train_blocks=single",
            "network_train_unet_only": "",
            "resolution": "64",
            "caption_extension": ".txt",
            "t5xxl_max_token_length": "16",
        }
        self._places = self._make_files()

    def _make_files(self) -> dict[str, str]:
        folder, models = self._folder, self._models
        colours = ("red", "blue")
        for place in ("images", "folders/1_cat", "regularisation/1_pet"):
            (folder / place).mkdir(parents=True)
            for number, colour in enumerate(colours):
                size = (100 - 30 * number, 70)
                down, across = (Image.linear_gradient("L").rotate(turn).resize(size) for turn in (0, 90))
                image = Image.merge("RGBA", (down, across, down, across))
                path = folder / place / f"{number}_50_35_30_30.png"
                image.save(path)
                words = f"a {colour} circle, large ||| square;;; small, {{green|black|white}}; star, on the left"
                path.with_suffix(".txt").write_text(words, encoding="utf-8")
        shutil.copytree(folder / "images", folder / "more" / "1_cat")
        for path in list((folder / "more" / "1_cat").iterdir()):
            if path.suffix == ".png":
                Image.open(path).rotate(180).save(path.with_name(f"again_{path.name}"))
        (folder / "masks").mkdir()
        for number in range(2):
            Image.linear_gradient("L").resize((100 - 30 * number, 70)).save(
                folder / "masks" / f"{number}_50_35_30_30.png"
            )
        dataset = f'[[datasets]]\n[[datasets.subsets]]\nimage_dir = "{(folder / "images").as_posix()}"\n'
        (folder / "dataset.toml").write_text(dataset, encoding="utf-8")
        masked = f'{dataset}conditioning_data_dir = "{(folder / "masks").as_posix()}"\n'
        (folder / "masked.toml").write_text(masked, encoding="utf-8")
        (folder / "prompts.txt").write_text("a red circle --w 32 --h 32 --s 1 --d 1\n", encoding="utf-8")
        (folder / "config.toml").write_text("[any]\nip_noise_gamma = 0.3\n", encoding="utf-8")
        (folder / "meta.json").write_text(
            '{"0_50_35_30_30": {"caption": "one"}, "1_50_35_30_30": {"caption": "two"}}', encoding="utf-8"
        )
        other = folder / "other"
        other.mkdir()
        make_clip_l(other / "clip_l.safetensors", seed=91)
        make_t5xxl(other / "t5xxl.safetensors", seed=92)
        make_autoencoder(other / "ae.safetensors", seed=93)
        for name, source in (("clip", models.clip_l_tokenizer), ("t5", models.t5xxl_tokenizer)):
            text = (source / "tokenizer.json").read_text(encoding="utf-8")
            # The same words with other numbers.
            words = re.findall(r"[a-z]*circle[a-z]*|[a-z]*square[a-z]*", text)
            assert words
            swapped = text.replace("circle", "\0").replace("square", "circle").replace("\0", "square")
            (other / f"{name}_tokenizer.json").write_text(swapped, encoding="utf-8")
        kept = folder / "kept"
        for name, place in (("clip", "openai_clip-vit-large-patch14"), ("t5", "google_t5-v1_1-xxl")):
            (kept / place).mkdir(parents=True)
            shutil.copy(other / f"{name}_tokenizer.json", kept / place / "tokenizer.json")
        return {
            "models": str(models.flux_dev.parent),
            "other": str(other),
            "kept": str(kept),
            "dataset": str(folder / "dataset.toml"),
            "masked": str(folder / "masked.toml"),
            "images": str(folder / "images"),
            "folders": str(folder / "folders"),
            "more": str(folder / "more"),
            "metadata": str(folder / "meta.json"),
            "regularisation": str(folder / "regularisation"),
            "prompts": str(folder / "prompts.txt"),
            "config": str(folder / "config.toml"),
        }

    def trace(self, words: tuple[str, ...], without: tuple[str, ...]) -> Trace:
        """The run with these words over the usual options; each is made once."""
        for need in ("lora", "state"):
            if any(f"{{{need}}}" in word for word in words) and need not in self._places:
                self._make_earlier_run()
        key = (*words, "|", *without)
        if key not in self._traces:
            self._traces[key] = self._run(words, without)
        return self._traces[key]

    def _make_earlier_run(self) -> None:
        out = self._folder / "earlier"
        found = answer(*self._words((f"--output_dir={out}", "--save_state_on_train_end", "--seed=5"), ()))
        assert found.code == 0, found.output
        (state,) = [path for path in out.iterdir() if path.is_dir() and "state" in path.name]
        self._places |= {"lora": str(out / "lora.safetensors"), "state": str(state)}

    def _words(self, words: tuple[str, ...], without: tuple[str, ...]) -> list[str]:
        base = [
            f"--{name}={value}" if value else f"--{name}" for name, value in self._base.items() if name not in without
        ]
        return [*base, *words]

    def _run(self, words: tuple[str, ...], without: tuple[str, ...]) -> Trace:
        self._count += 1
        out = self._folder / f"out{self._count}"
        images = self._folder / "images"
        before = set(images.rglob("*"))
        places = self._places | {"out": str(out)}
        filled = [f"--output_dir={out}", *(re.sub(r"\{(\w+)\}", lambda m: places[m[1]], word) for word in words)]
        with counted_calls() as calls:
            found = answer(*self._words(tuple(filled), without))
        made = [path for path in images.rglob("*") if path not in before]
        files = [path.relative_to(out) for path in out.rglob("*")] + [path.relative_to(images) for path in made]
        for path in made:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        weights, tensors, metadata = hashlib.sha256(), list[str](), dict[str, str]()
        for path in sorted(out.rglob("lora.safetensors")):
            with safe_open(path, framework="pt") as file:
                metadata = dict(file.metadata() or {})
                for name in sorted(file.keys()):
                    tensor = file.get_tensor(name)
                    tensors.append(f"{name} {list(tensor.shape)} {tensor.dtype}")
                    weights.update(tensor.float().numpy().tobytes())
        return Trace(
            found.code,
            weights.hexdigest(),
            tuple(tensors),
            tuple(sorted(re.sub(r"\d{8,}|tfevents.*", "N", str(path)) for path in files)),
            metadata,
            tuple(plain_lines(found.output, out)),
            found.output,
            calls,
        )

    def compare(self, name: str, effect: Effect) -> tuple[Trace, Trace]:
        option = f"--{name}={effect.given}" if effect.given else f"--{name}"
        return self.trace(effect.beside, effect.without), self.trace((*effect.beside, option), effect.without)


def plain_lines(output: str, out: Path) -> Generator[str, None, None]:
    """The lines without times, progress bars and the run's own folder."""
    for line in re.split(r"[\r\n]+", output):
        if re.search(r"\d+%\|", line) is None and line.strip():
            text = re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+", "TIME", line).replace(str(out), "OUT")
            yield text


@contextlib.contextmanager
def counted_calls() -> Generator[Counter[str], None, None]:
    """How often modules of each class are called meanwhile."""
    calls: Counter[str] = Counter()

    def count(module: torch.nn.Module, _: object) -> None:
        calls[type(module).__name__] += 1

    handle = torch.nn.modules.module.register_module_forward_pre_hook(count)
    try:
        yield calls
    finally:
        handle.remove()


@pytest.fixture(scope="module")
def workshop(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tiny_models, tmp_path_factory.mktemp("workshop"))


@pytest.mark.parametrize("name", [name for name in SUPPORTED if name in EFFECTS])
def test_a_supported_option_changes_something(workshop: Workshop, name: str) -> None:
    effect = EFFECTS[name]
    without, given = workshop.compare(name, effect)
    assert without.code == 0 or effect.part == "code", without.output
    assert given.code == 0 or effect.part == "code", given.output
    assert without.part(effect.part) != given.part(effect.part)


def test_a_run_is_repeated_exactly_so_that_a_difference_has_a_cause(workshop: Workshop) -> None:
    first, again = workshop.trace((), ()), workshop.trace(("--seed=1",), ())
    for part in ("code", "weights", "tensors", "files", "lines", "calls"):
        assert first.part(part) == again.part(part), part
    assert first.code == 0, first.output
