"""Projects of other tools, as those write them, run unchanged on tiny models and mean the same."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open

from tests.runs.in_process import Answer, answer
from tests.tiny import TinyModels, make_full_depth_flux
from trainer.tools.tiny_models import make_images

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]

FLUXGYM_SCRIPT = """\
accelerate launch \\
  --mixed_precision bf16 \\
  --num_cpu_threads_per_process 1 \\
  sd-scripts/flux_train_network.py \\
  --pretrained_model_name_or_path "{flux}" \\
  --clip_l "{clip_l}" \\
  --t5xxl "{t5xxl}" \\
  --ae "{ae}" \\
  --cache_latents_to_disk \\
  --save_model_as safetensors \\
  --sdpa --persistent_data_loader_workers \\
  --max_data_loader_n_workers 2 \\
  --seed 42 \\
  --gradient_checkpointing \\
  --mixed_precision bf16 \\
  --save_precision bf16 \\
  --network_module networks.lora_flux \\
  --network_dim 4 \\
  --optimizer_type adafactor \\
  --optimizer_args "relative_step=False" "scale_parameter=False" "warmup_init=False" \\
  --split_mode \\
  --network_args "train_blocks=single" \\
  --lr_scheduler constant_with_warmup \\
  --max_grad_norm 0.0 \\
  --sample_prompts="{folder}/sample_prompts.txt" --sample_every_n_steps="2" \\
  --learning_rate 8e-4 \\
  --cache_text_encoder_outputs \\
  --cache_text_encoder_outputs_to_disk \\
  --fp8_base \\
  --highvram \\
  --max_train_epochs 2 \\
  --save_every_n_epochs 1 \\
  --dataset_config "{folder}/dataset.toml" \\
  --output_dir "{folder}/my cat" \\
  --output_name my-cat \\
  --timestep_sampling shift \\
  --discrete_flow_shift 3.1582 \\
  --model_prediction_type raw \\
  --guidance_scale 1 \\
  --loss_type l2 \\
"""
FLUXGYM_DATASET = """\
[general]
shuffle_caption = false
caption_extension = '.txt'
keep_tokens = 1

[[datasets]]
resolution = 64
batch_size = 1
keep_tokens = 1

  [[datasets.subsets]]
  image_dir = '{images}'
  class_tokens = 'a cat'
  num_repeats = 2"""

KOHYA_SS_CONFIG = """\
ae = "{ae}"
bucket_no_upscale = true
bucket_reso_steps = 64
cache_latents = true
cache_latents_to_disk = true
cache_text_encoder_outputs = true
caption_extension = ".txt"
clip_l = "{clip_l}"
clip_skip = 1
discrete_flow_shift = 3.1582
dynamo_backend = "no"
enable_bucket = true
epoch = 1
gradient_accumulation_steps = 1
gradient_checkpointing = true
guidance_scale = 1.0
highvram = true
huber_c = 0.1
huber_scale = 1
huber_schedule = "snr"
loss_type = "l2"
lr_scheduler = "constant"
lr_scheduler_args = []
lr_scheduler_num_cycles = 1
lr_scheduler_power = 1
lr_warmup_steps = 0
max_bucket_reso = 2048
max_data_loader_n_workers = 0
max_grad_norm = 1
max_timestep = 1000
max_train_steps = 2
min_bucket_reso = 64
mixed_precision = "bf16"
model_prediction_type = "raw"
multires_noise_discount = 0.3
network_alpha = 4
network_args = []
network_dim = 4
network_module = "networks.lora_flux"
network_train_unet_only = true
noise_offset_type = "Original"
optimizer_args = []
optimizer_type = "AdamW8bit"
output_dir = "{folder}/output"
output_name = "last"
pretrained_model_name_or_path = "{flux}"
prior_loss_weight = 1
resolution = "128,128"
sample_prompts = "{folder}/sample_prompts.txt"
sample_sampler = "euler_a"
save_every_n_epochs = 1
save_model_as = "safetensors"
save_precision = "bf16"
sdpa = true
seed = 1234
t5xxl = "{t5xxl}"
t5xxl_max_token_length = 512
text_encoder_lr = []
timestep_sampling = "sigma"
train_batch_size = 2
train_data_dir = "{folders}"
unet_lr = 0.0004
vae = ""
wandb_run_name = "last"
"""

SECTIONED_CONFIG = """\
# my settings for a 16 GB card
[model]
pretrained_model_name_or_path = '{flux}'
clip_l = '{clip_l}'
t5xxl = '{t5xxl}'
ae = '{ae}'

[data]
dataset_config = '{folder}/dataset.toml'
max_data_loader_n_workers = 1

[network]
network_module = "networks.lora_flux"
network_dim = 8
network_alpha = 8
network_args = ["train_double_block_indices=none", "train_single_block_indices=0,2-3"]
network_train_unet_only = true

[training]
learning_rate = 1e-3
lr_scheduler = "cosine"
lr_warmup_steps = "50%"
max_train_steps = 4
optimizer_type = "AdamW"
optimizer_args = ["weight_decay=0.01"]
gradient_accumulation_steps = 2
seed = 7

[flux]
timestep_sampling = "flux_shift"
model_prediction_type = "raw"
guidance_scale = 1.0

[saving]
output_dir = '{folder}/output'
output_name = "mine"
save_precision = "fp16"
"""

MASKED_DATASET = """\
[general]
caption_extension = ".txt"

[[datasets]]
resolution = 64
batch_size = 2

[[datasets.subsets]]
image_dir = "{images}"
conditioning_data_dir = "{masks}"
num_repeats = 2

[[datasets.subsets]]
is_reg = true
image_dir = "{regularisation}"
class_tokens = "a shape"
num_repeats = 1
"""


class Project:
    """A folder with pictures, and the names that its files hold."""

    def __init__(self, models: TinyModels, folder: Path, flux: Path | None = None) -> None:
        make_images(folder / "images", 2)
        (folder / "sample_prompts.txt").write_text("a red circle --w 64 --h 64 --s 2 --d 1\n", encoding="utf-8")
        self.folder = folder
        self.names = {
            "flux": str(flux or models.flux_dev),
            "clip_l": str(models.clip_l),
            "t5xxl": str(models.t5xxl),
            "ae": str(models.ae),
            "folder": str(folder),
            "images": str(folder / "images"),
        }
        self._tokenizers = [word for word in models.arguments() if "tokenizer" in word]

    def write(self, name: str, text: str) -> Path:
        (self.folder / name).write_text(text.format(**self.names), encoding="utf-8")
        return self.folder / name

    def run(self, *words: str) -> Answer:
        """The command; only the tokenizers are added, which the tools download."""
        found = answer(*words, *self._tokenizers)
        assert found.code == 0, found.output
        assert "run completed" in found.output, found.output
        return found


def metadata_and_keys(path: Path) -> tuple[dict[str, str], list[str], set[str]]:
    with safe_open(path, framework="pt") as file:
        keys = sorted(file.keys())
        return dict(file.metadata()), keys, {str(file.get_tensor(key).dtype) for key in keys}


def test_a_fluxgym_script_with_its_dataset(tiny_models: TinyModels, tmp_path: Path) -> None:
    """Its script for 12 GB."""
    project = Project(tiny_models, tmp_path, make_full_depth_flux(tmp_path / "flux1-dev.sft.safetensors"))
    project.write("dataset.toml", FLUXGYM_DATASET)
    script = project.write("train.sh", FLUXGYM_SCRIPT).read_text(encoding="utf-8")
    words = shlex.split(script.replace("\\\n", " "))
    found = project.run(*words[words.index("sd-scripts/flux_train_network.py") + 1 :])
    output = tmp_path / "my cat"
    assert sorted(path.name for path in output.glob("*.safetensors")) == [
        "my-cat-000001.safetensors",
        "my-cat.safetensors",
    ]
    assert len(list((output / "sample").glob("*.png"))) == 4
    metadata, keys, dtypes = metadata_and_keys(output / "my-cat.safetensors")
    assert metadata["ss_steps"] == "8", "2 pictures, 2 repeats, 2 epochs"
    assert metadata["ss_optimizer"].startswith("transformers.optimization.Adafactor")
    assert (metadata["ss_fp8_base"], metadata["ss_fp8_base_unet"]) == ("True", "False")
    assert metadata["ss_fluxgui_base_storage"] == "fp8"
    assert all(key.startswith("lora_unet_single_blocks_") for key in keys if key.startswith("lora_unet"))
    assert dtypes == {"torch.bfloat16"}
    assert "split_mode is an old name: blocks_to_swap is 18" in found.output
    assert "highvram has no effect" in found.output


def test_a_config_file_of_kohya_ss(tiny_models: TinyModels, tmp_path: Path) -> None:
    project = Project(tiny_models, tmp_path)
    (tmp_path / "img").mkdir()
    (tmp_path / "images").rename(tmp_path / "img" / "4_shape thing")
    project.names["folders"] = str(tmp_path / "img")
    config = project.write("config_lora-20250101-120000.toml", KOHYA_SS_CONFIG.replace('wandb_run_name = "last"\n', ""))
    found = project.run("--config_file", str(config))
    metadata, keys, dtypes = metadata_and_keys(tmp_path / "output" / "last.safetensors")
    assert (metadata["ss_steps"], metadata["ss_num_train_images"], metadata["ss_network_dim"]) == ("2", "8", "4")
    assert not [key for key in keys if not key.startswith("lora_unet_")]
    assert dtypes == {"torch.bfloat16"}
    assert f"epoch in {config} is not a known option and has no effect" in found.output
    assert "sample_sampler has no effect" in found.output


def test_a_config_file_with_sections_written_by_hand(tiny_models: TinyModels, tmp_path: Path) -> None:
    project = Project(tiny_models, tmp_path)
    project.write("dataset.toml", FLUXGYM_DATASET)
    project.write("mine.toml", SECTIONED_CONFIG)
    project.run(f"--config_file={tmp_path / 'mine'}", "--network_dim=4")
    metadata, keys, dtypes = metadata_and_keys(tmp_path / "output" / "mine.safetensors")
    assert metadata["ss_network_dim"] == "4", "the command line wins"
    assert metadata["ss_network_alpha"] == "8.0"
    assert (metadata["ss_steps"], metadata["ss_gradient_accumulation_steps"]) == ("4", "2")
    blocks = {key.split("_linear")[0].split("_modulation")[0] for key in keys}
    assert blocks == {f"lora_unet_single_blocks_{number}" for number in (0, 2, 3)}
    assert "torch.float16" in dtypes


def test_a_command_with_folders_named_by_repeats(tiny_models: TinyModels, tmp_path: Path) -> None:
    project = Project(tiny_models, tmp_path)
    (tmp_path / "train").mkdir()
    (tmp_path / "images").rename(tmp_path / "train" / "3_ohwx cat")
    make_images(tmp_path / "train" / "1_other", 2)
    for path in (tmp_path / "train" / "1_other").glob("*.txt"):
        path.unlink()
    (tmp_path / "train" / "notes").mkdir()
    names = project.names
    command = (
        "--pretrained_model_name_or_path {flux} --clip_l {clip_l} --t5xxl {t5xxl} --ae {ae} --train_data_dir {folder}/train "
        "--output_dir {folder}/output --output_name cat --network_module networks.lora_flux --network_dim 4 "
        "--caption_extension .txt --resolution 128,128 --enable_bucket --min_bucket_reso 64 --train_batch_size 2 --max_train_epochs 1 "
        "--learning 1e-4 --network_train_unet --save_precision=float --seed 1 --t5xxl_max_token_length 16"
    ).format(**names)
    found = project.run(*command.split())
    metadata, _, _ = metadata_and_keys(tmp_path / "output" / "cat.safetensors")
    assert (metadata["ss_num_train_images"], metadata["ss_steps"]) == ("8", "4"), "2 x 3 + 2 x 1 pictures in twos"
    assert "notes is left out" in found.output


def test_a_project_with_masks_and_regularisation(tiny_models: TinyModels, tmp_path: Path) -> None:
    project = Project(tiny_models, tmp_path)
    make_images(tmp_path / "regularisation", 3)
    (tmp_path / "masks").mkdir()
    for path in (tmp_path / "images").glob("*.png"):
        with Image.open(path) as image:
            Image.linear_gradient("L").resize(image.size).save(tmp_path / "masks" / path.name)
    project.names |= {"masks": str(tmp_path / "masks"), "regularisation": str(tmp_path / "regularisation")}
    dataset = project.write("dataset.toml", MASKED_DATASET)
    words = [
        *(f"--{name}={project.names[name]}" for name in ("clip_l", "t5xxl", "ae")),
        f"--pretrained_model_name_or_path={project.names['flux']}",
        f"--dataset_config={dataset}",
        f"--output_dir={tmp_path / 'output'}",
        "--output_name=masked",
        "--network_module=networks.lora_flux",
        "--masked_loss",
        "--prior_loss_weight=0.5",
        "--max_train_epochs=1",
        "--learning_rate=1e-3",
        "--network_train_unet_only",
        "--cache_latents",
        "--t5xxl_max_token_length=16",
        "--seed=1",
    ]
    project.run(*words)
    metadata, _, _ = metadata_and_keys(tmp_path / "output" / "masked.safetensors")
    assert metadata["ss_num_train_images"] == "4"
    # Regularisation pictures are drawn as often as the others together.
    assert int(metadata["ss_steps"]) >= 4
