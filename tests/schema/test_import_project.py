"""Projects of other tools, pasted: the same options as the command line gives, and everything else is told."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from tests.runs.test_existing_projects import (
    FLUXGYM_DATASET,
    FLUXGYM_SCRIPT,
    KOHYA_SS_CONFIG,
    MASKED_DATASET,
    SECTIONED_CONFIG,
)
from trainer.schema.base import UserError
from trainer.schema.cli import ParsedCommand, parse_command_line, read_command_line, read_values, to_argv
from trainer.schema.import_project import import_project

NAMES = {
    "flux": "/models/flux1 dev.safetensors",
    "clip_l": "/models/clip_l.safetensors",
    "t5xxl": "/models/t5xxl.safetensors",
    "ae": "/models/ae.safetensors",
    "folder": "/data/my project",
    "images": "/data/my project/images",
    "folders": "/data/my project/img",
    "masks": "/data/masks",
    "regularisation": "/data/reg",
}

COMMAND = (
    "--pretrained_model_name_or_path {clip_l} --clip_l {clip_l} --t5xxl {t5xxl} --ae {ae} --train_data_dir /data/train "
    "--output_dir /data/output --output_name cat --network_module networks.lora_flux --network_dim 4 "
    "--caption_extension .txt --resolution 128,128 --enable_bucket --min_bucket_reso 64 --train_batch_size 2 "
    "--max_train_epochs 1 --learning 1e-4 --network_train_unet --save_precision=float --seed 1 --t5xxl_max_token_length 16"
)
MASKED = (
    "flux_train_network.py --pretrained_model_name_or_path='{flux}' --clip_l={clip_l} --t5xxl={t5xxl} --ae={ae} "
    "--dataset_config='/data/data set.toml' --output_dir=/data/out --output_name=masked "
    "--network_module=networks.lora_flux --masked_loss --prior_loss_weight=0.5 --max_train_epochs=1 "
    "--learning_rate=1e-3 --network_train_unet_only --cache_latents --t5xxl_max_token_length=16 --seed=1"
)


def words_after_script(text: str) -> list[str]:
    words = shlex.split(text.replace("\\\n", " "))
    return words[next(at for at, word in enumerate(words) if word.endswith("flux_train_network.py")) + 1 :]


def same_values(text: str, parsed: ParsedCommand, files: str = "") -> None:
    """The import gives the parser's options, and its values give them again."""
    found = import_project(text, files)
    assert found.options == parsed.options
    assert read_values(found.values, where="the values").options == parsed.options


def test_a_fluxgym_script_gives_the_parsers_options() -> None:
    text = FLUXGYM_SCRIPT.format(**NAMES)
    same_values(text, parse_command_line(words_after_script(text)), FLUXGYM_DATASET.format(**NAMES))
    found = import_project(text, FLUXGYM_DATASET.format(**NAMES))
    assert found.dataset is not None
    assert found.dataset["general"] == {"shuffle_caption": False, "caption_extension": ".txt", "keep_tokens": 1}
    assert "split_mode is an old name: blocks_to_swap is 18" in found.changed
    assert any("--num_cpu_threads_per_process 1 before the script" in line for line in found.changed)
    assert (found.not_understood, found.problems) == ((), ())


def test_a_windows_script_of_fluxgym_gives_the_same_as_that_of_bash() -> None:
    names = {**NAMES, "folder": "C:\\fluxgym\\outputs\\my cat", "flux": "C:\\models\\flux1-dev.sft"}
    lines = FLUXGYM_SCRIPT.format(**names).split("\n")
    for mark in ("^", "`"):
        script = "\r\n".join(line.removesuffix("\\") + mark if line.endswith("\\") else line for line in lines)
        found = import_project(f"@echo off\r\ncall env\\Scripts\\activate\r\n{script}\r\n")
        assert str(found.options.sample_prompts) == "C:\\fluxgym\\outputs\\my cat/sample_prompts.txt"
        assert found.options.optimizer_args == ("relative_step=False", "scale_parameter=False", "warmup_init=False")
        assert found.not_understood == ("other line of the script: call env\\Scripts\\activate",)
        bash = import_project(FLUXGYM_SCRIPT.format(**NAMES)).options
        paths = {name: getattr(bash, name) for name in ("pretrained_model_name_or_path", "output_dir")}
        paths |= {name: getattr(bash, name) for name in ("dataset_config", "sample_prompts")}
        assert found.options.model_copy(update=paths) == bash


def test_options_files_give_the_parsers_options(tmp_path: Path) -> None:
    for text in (KOHYA_SS_CONFIG.format(**NAMES), SECTIONED_CONFIG.format(**NAMES)):
        (tmp_path / "config.toml").write_text(text, encoding="utf-8")
        same_values(text, read_command_line([f"--config_file={tmp_path / 'config.toml'}"]))
    found = import_project(KOHYA_SS_CONFIG.format(**NAMES))
    assert "epoch = 1: kohya_ss's own note, which the trainer does not read" in found.changed
    assert found.not_understood == ()


def test_a_command_with_a_pasted_options_file_lets_the_command_win(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(SECTIONED_CONFIG.format(**NAMES), encoding="utf-8")
    words = [f"--config_file={tmp_path / 'mine.toml'}", "--network_dim=4"]
    same_values(" ".join(words), parse_command_line(words))
    same_values("--config_file gone.toml --network_dim=4", parse_command_line(words), SECTIONED_CONFIG.format(**NAMES))


def test_bare_options_give_the_parsers_options() -> None:
    same_values(COMMAND.format(**NAMES), parse_command_line(COMMAND.format(**NAMES).split()))


def test_a_project_with_masks_gives_the_parsers_options() -> None:
    text = MASKED.format(**NAMES)
    same_values(text, parse_command_line(words_after_script(text)), MASKED_DATASET.format(**NAMES))


def test_what_is_not_understood_is_listed_and_nothing_is_lost() -> None:
    found = import_project(
        "#!/bin/bash\nRANK=8\nsource venv/bin/activate\nCUDA_VISIBLE_DEVICES=1 accelerate launch --num_processes 2 "
        "flux_train_network.py --network_dim=$RANK --output_name $NAME --deepspeed --wxyzq blue green --huggingface_token=abc "
        "--network_alhpa 3\n--seed=1 && shutdown now"
    )
    assert found.options.network_dim == 8
    assert found.options.seed == 1
    assert "huggingface_token" not in found.values
    assert found.options.huggingface_token is None
    told = "\n".join(found.not_understood)
    for text in ("venv/bin/activate", "CUDA_VISIBLE_DEVICES=1", "--num_processes 2", "variable NAME", "shutdown"):
        assert text in told, text
    assert "--wxyzq blue green: there is no such option." in found.not_understood
    assert "--network_alhpa 3: there is no such option. Did you mean --network_alpha?" in found.not_understood
    assert [problem.field for problem in found.problems] == ["deepspeed"]


KOHYA_SETTINGS = {
    "LoRA_type": "Flux1",
    "additional_parameters": "--sigmoid_scale=2 --unheard_of",
    "ae": "/models/ae.safetensors",
    "clip_l": "/models/clip_l.safetensors",
    "t5xxl": "/models/t5.safetensors",
    "pretrained_model_name_or_path": "/models/flux1-dev.safetensors",
    "bucket_reso_steps": 64,
    "epoch": 8,
    "flux1_checkbox": True,
    "flux1_cache_text_encoder_outputs": True,
    "ggpo_beta": 0.01,
    "img_attn_dim": "4",
    "learning_rate": 0.0001,
    "loraplus_lr_ratio": 16,
    "lr_scheduler": "cosine",
    "lr_scheduler_args": "",
    "lr_warmup": 10,
    "max_data_loader_n_workers": 0,
    "max_grad_norm": 0,
    "max_token_length": 75,
    "max_resolution": "768,768",
    "max_timestep": 1000,
    "max_train_epochs": 0,
    "max_train_steps": 0,
    "min_snr_gamma": 0,
    "mixed_precision": "bf16",
    "model_prediction_type": "raw",
    "multires_noise_iterations": 8,
    "network_alpha": 8,
    "network_dim": 16,
    "noise_offset_type": "Original",
    "num_processes": 1,
    "optimizer": "AdamW8bit",
    "optimizer_args": "weight_decay=0.01 eps=1e-6",
    "sample_prompts": "a cat --w 512\na dog",
    "seed": 0,
    "split_qkv": True,
    "text_encoder_lr": 0,
    "timestep_sampling": "sigmoid",
    "train_batch_size": 2,
    "train_data_dir": "/data/img",
    "unet_lr": 0.0002,
    "vae": "",
    "xformers": "sdpa",
}


def test_settings_of_kohya_ss_give_what_its_page_would_have_started() -> None:
    """Against the options file that its page writes for these settings, after its source."""
    found = import_project(json.dumps(KOHYA_SETTINGS))
    expected = read_values(
        {
            "ae": "/models/ae.safetensors",
            "bucket_reso_steps": 64,
            "cache_text_encoder_outputs": True,
            "clip_l": "/models/clip_l.safetensors",
            "learning_rate": 0.0001,
            "lr_scheduler": "cosine",
            "lr_warmup_steps": 0.1,
            "max_data_loader_n_workers": 0,
            "max_timestep": 1000,
            "max_train_epochs": 8,
            "mixed_precision": "bf16",
            "model_prediction_type": "raw",
            "network_alpha": 8,
            "network_args": ["img_attn_dim=4", "split_qkv=True"],
            "network_dim": 16,
            "network_module": "networks.lora_flux",
            "network_train_unet_only": True,
            "optimizer_args": ["weight_decay=0.01", "eps=1e-6"],
            "optimizer_type": "AdamW8bit",
            "pretrained_model_name_or_path": "/models/flux1-dev.safetensors",
            "resolution": "768,768",
            "sdpa": True,
            "sigmoid_scale": 2,
            "t5xxl": "/models/t5.safetensors",
            "timestep_sampling": "sigmoid",
            "train_batch_size": 2,
            "train_data_dir": "/data/img",
            "unet_lr": 0.0002,
        },
        where="the file",
    )
    assert (found.options, found.problems) == (expected.options, ())
    assert found.prompts == "a cat --w 512\na dog"
    assert "optimizer is called optimizer_type here" in found.changed
    told = "\n".join(found.not_understood)
    assert "loraplus_lr_ratio" in told
    assert "--unheard_of: there is no such option." in told


def test_files_that_a_command_names_are_read(tmp_path: Path) -> None:
    (tmp_path / "data.toml").write_text(FLUXGYM_DATASET.format(**NAMES), encoding="utf-8")
    (tmp_path / "prompts.txt").write_text("a cat\n", encoding="utf-8")
    command = f"--dataset_config={tmp_path}/data.toml --sample_prompts={tmp_path}/prompts.txt --output_name=a"
    found = import_project(command, read_file=lambda path: path.read_text(encoding="utf-8"))
    assert found.dataset is not None
    assert found.prompts == "a cat"
    gone = import_project(
        "--dataset_config=/nowhere/data.toml", read_file=lambda path: path.read_text(encoding="utf-8")
    )
    assert gone.dataset is None
    assert "paste it as well" in gone.not_understood[0]


@pytest.mark.parametrize("text", ["", "hello world", '{"a": ', 'flux_train_network.py --a "b', "[a\nb"])
def test_what_is_no_project_is_said_to_be_none(text: str) -> None:
    with pytest.raises(UserError) as raised:
        import_project(text)
    assert raised.value.exit_code == 2


def test_an_imported_command_can_be_written_again() -> None:
    text = FLUXGYM_SCRIPT.format(**NAMES)
    found = import_project(text)
    assert import_project(shlex.join(to_argv(found.options))).options == found.options
