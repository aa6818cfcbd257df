"""Wrong inputs of every kind, through the program's own entry function: each is one clear line with its place and what
to do, before anything heavy loads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.runs.in_process import Answer, answer, small_run, words_of
from tests.tiny import TinyModels, make_tiny_dataset
from trainer.tools.tiny_models import make_t5xxl

pytestmark = pytest.mark.timeout(120)

SECONDS = 5.0


@dataclass(frozen=True)
class Project:
    """A project in which nothing is wrong yet: its options, and the folder of its dataset file and pictures."""

    options: dict[str, str]
    words: list[str]
    folder: Path

    @property
    def dataset(self) -> Path:
        return self.folder / "dataset.toml"

    @property
    def images(self) -> Path:
        return self.folder / "images"

    @property
    def picture(self) -> Path:
        return sorted(self.images.glob("*.png"))[0]

    def write(self, name: str, text: str | bytes) -> str:
        path = self.folder / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)


Spoil = Callable[[Project], object]


def option(**values: str) -> Spoil:
    """Options of the command line."""
    return lambda project: project.options.update(values)


def without(*names: str) -> Spoil:
    return lambda project: [project.options.pop(name) for name in names]


def words(*more: str) -> Spoil:
    return lambda project: project.words.extend(more)


def config(text: str) -> Spoil:
    """An options file with this text."""
    return lambda project: project.options.update(config_file=project.write("config.toml", text))


def dataset(text: str, name: str = "dataset.toml") -> Spoil:
    """A dataset file with this text; IMAGES stands for the folder of pictures."""
    return lambda project: project.options.update(
        dataset_config=project.write(name, text.replace("IMAGES", project.images.as_posix()))
    )


def file(option_name: str, name: str, text: str | bytes) -> Spoil:
    """An option that names a file with this content."""
    return lambda project: project.options.update({option_name: project.write(name, text)})


def picture(content: bytes) -> Spoil:
    return lambda project: project.picture.write_bytes(content)


def drawn(width: int, height: int, mode: str = "1") -> Spoil:
    """A picture of another size."""
    return lambda project: Image.new(mode, (width, height)).save(project.picture)


def with_no_network_weights(project: Project) -> None:
    path = project.folder / "other.safetensors"
    save_file({"some.weight": torch.zeros(2, 2)}, path)
    project.options["network_weights"] = str(path)


def narrow_t5(project: Project) -> None:
    project.options["t5xxl"] = str(make_t5xxl(project.folder / "narrow.safetensors", d_model=32))


def folder_of_pictures(name: str) -> Spoil:
    """Folder mode: pictures in train/NAME."""

    def spoil(project: Project) -> None:
        (project.folder / "train").mkdir()
        project.images.rename(project.folder / "train" / name)
        del project.options["dataset_config"]
        project.options["train_data_dir"] = str(project.folder / "train")

    return spoil


SUBSET = '[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "IMAGES"\n'

CASES: dict[str, tuple[Spoil, int, list[str]]] = {
    # ---- the command line
    "a rank of nothing": (option(network_dim="0"), 2, ["network_dim is 0; it must be 1 to 1024 (--network_dim)"]),
    "a word for a number": (option(network_dim="four"), 2, ["network_dim is four; it must be a whole number"]),
    "a number with a letter": (option(learning_rate="1e-4x"), 2, ["learning_rate is 1e-4x; it must be a number"]),
    "a rate below zero": (option(learning_rate="-1"), 2, ["learning_rate is -1; it must be 0 or more"]),
    "not a number": (option(guidance_scale="nan"), 2, ["guidance_scale is nan; it must be a number"]),
    "an unknown choice": (
        option(mixed_precision="bf61"),
        2,
        ["it must be one of no, fp16, bf16", "Did you mean bf16?"],
    ),
    "a misspelt choice": (option(timestep_sampling="flux-shift"), 2, ["Did you mean flux_shift?"]),
    "a misspelt option": (option(learning_rat3="1"), 2, ["--learning_rat3 is not a known option", "--learning_rate?"]),
    "an abbreviation of several": (words("--save=1"), 2, ["--save is not unique", "Write the option in full."]),
    "a switch with a value": (option(cache_latents="true"), 2, ["is a switch and takes no value", "Write --cache_"]),
    "an option without its value": (words("--seed"), 2, ["seed needs a value (--seed)", "Write --seed=..."]),
    "a stray word": (words("stray"), 2, ['"stray" belongs to no option', "needs quotes"]),
    "a part above the whole": (option(caption_dropout_rate="2"), 2, ["caption_dropout_rate is 2; it must be 0 to 1"]),
    "a resolution between the steps": (option(resolution="500"), 2, ["must be a multiple of 16; 496 is near"]),
    "a resolution of words": (option(resolution="big"), 2, ["must be a size such as 512"]),
    "a warm-up longer than the run": (
        option(lr_scheduler="cosine", lr_warmup_steps="150%"),
        2,
        ["lr_warmup_steps is 150%; it must be a whole number of steps, or a part of the run"],
    ),
    # ---- contradictions
    "a warm-up of a constant rate": (option(lr_warmup_steps="10"), 2, ["has no warm-up", "constant_with_warmup"]),
    "an empty range of timesteps": (option(min_timestep="500", max_timestep="500"), 2, ["not below max_timestep 500"]),
    "a schedule FLUX does not have": (
        option(loss_type="huber", huber_schedule="snr"),
        2,
        ["huber_schedule snr does not exist for FLUX", "--huber_schedule=constant or exponential"],
    ),
    "two optimizers": (words("--use_8bit_adam", "--optimizer_type=AdamW"), 2, ["contradicts optimizer_type AdamW"]),
    "a tracker without a folder": (option(log_with="tensorboard"), 2, ["needs logging_dir", "Give the log folder."]),
    "buckets that end before they begin": (
        option(min_bucket_reso="512", max_bucket_reso="256"),
        2,
        ["min_bucket_reso 512 is above max_bucket_reso 256"],
    ),
    "bucket steps larger than the resolution": (
        dataset(SUBSET.replace("64", "64\nenable_bucket = true\nbucket_reso_steps = 128\nmin_bucket_reso = 16")),
        3,
        ["resolution 64x64 is smaller than bucket_reso_steps 128", "Lower bucket_reso_steps"],
    ),
    "bucket steps of 24": (option(bucket_reso_steps="24"), 2, ["must be a multiple of 16", "64 is usual."]),
    "more blocks than FLUX has": (option(blocks_to_swap="99"), 2, ["blocks_to_swap is 99; it must be 0 to"]),
    "more blocks than this model has": (option(blocks_to_swap="18"), 2, ["2 double and 4 single", "allowed is 4"]),
    "a name with a folder": (option(output_name="a/b"), 2, ["without a folder", "output_dir"]),
    "a misspelt network setting": (option(network_args="train_block=all"), 2, ["train_block", "train_blocks"]),
    "a block that is not there": (
        option(network_args="train_double_block_indices=7"),
        2,
        ["names block 7, but this model has double blocks 0 to 1 (--network_args)"],
    ),
    "a misspelt optimizer setting": (option(optimizer_args="weight_deca=0.1"), 2, ["weight_deca"]),
    "a network of another model": (option(network_module="networks.dylora"), 2, ["does not fit FLUX", "lora_flux"]),
    "a file format that holds code": (option(save_model_as="ckpt"), 2, ["is not written", "Use safetensors."]),
    # ---- options files
    "an options file that is not there": (option(config_file="/nowhere/config"), 2, ["/nowhere/config.toml"]),
    "an options file that is not TOML": (config("seed =\n"), 2, ["not valid TOML", "line 1"]),
    "a text for a number in a file": (config('network_dim = "four"\n'), 2, ["network_dim is four", "config.toml"]),
    "a text for a switch in a file": (
        config('[speed]\ngradient_checkpointing = "perhaps"\n'),
        2,
        ["gradient_checkpointing is perhaps; it must be true or false", "config.toml, [speed]"],
    ),
    "a list for a number in a file": (config("seed = [1, 2]\n"), 2, ["seed is 1 2; it must be a whole number"]),
    "a switch for a number in a file": (config("network_dim = true\n"), 2, ["network_dim is true; it must be a whole"]),
    "an unknown choice in a file": (config('loss_type = "l3"\n'), 2, ["loss_type is l3; it must be one of l1, l2"]),
    # ---- dataset files
    "a dataset file that is not there": (option(dataset_config="/nowhere/d.toml"), 3, ["/nowhere/d.toml", "typing"]),
    "a dataset file that is not TOML": (dataset("[[datasets\n"), 2, ["not valid TOML", "dataset.toml"]),
    "a dataset file that is not JSON": (dataset('{"datasets": [', "data.json"), 2, ["not valid JSON", "data.json"]),
    "a dataset file of another kind": (dataset(SUBSET, "data.yaml"), 2, ["It must end in .toml or .json."]),
    "a misspelt key": (dataset(SUBSET + "num_repeat = 2\n"), 2, ["num_repeat is not a known key", "num_repeats?"]),
    "a misspelt table": (dataset("[genral]\n" + SUBSET), 2, ["genral is not a known key", "Did you mean general?"]),
    "a text for a number": (
        dataset(SUBSET + 'num_repeats = "3"\n'),
        2,
        ['num_repeats is "3"; it must be a whole number', "Leave the quotes out."],
    ),
    "a text for a switch": (dataset(SUBSET + 'flip_aug = "yes"\n'), 2, ["flip_aug is yes; it must be true or false"]),
    "more draws than a list can hold": (
        dataset(SUBSET + "num_repeats = 99999999\n"),
        3,
        ["draws of pictures", "Lower num_repeats."],
    ),
    "a relative folder from elsewhere": (
        dataset(SUBSET.replace("IMAGES", "no such place")),
        3,
        ["the picture folder no such place does not exist", "it was looked for in"],
    ),
    "a number for a text": (dataset(SUBSET + "caption_prefix = 3\n"), 2, ["caption_prefix is 3; it must be text"]),
    "a key in the wrong table": (
        dataset(SUBSET + "batch_size = 2\n"),
        2,
        ["batch_size cannot stand here", "[[datasets]]"],
    ),
    "one bracket too few": (dataset("[datasets]\nresolution = 64\n"), 2, ["with two brackets"]),
    "a dataset without subsets": (dataset("[[datasets]]\nresolution = 64\n"), 2, ["there is no [[datasets.subsets]]"]),
    "a subset without a folder": (dataset("[[datasets]]\nresolution = 64\n[[datasets.subsets]]\n"), 2, ["image_dir"]),
    "a dataset without a size": (
        dataset('[[datasets]]\n[[datasets.subsets]]\nimage_dir = "IMAGES"\n'),
        2,
        ["there is no resolution", "Add resolution = 512"],
    ),
    "a folder that is not there": (dataset(SUBSET.replace("IMAGES", "/nowhere")), 3, ["/nowhere does not exist"]),
    "a file for a folder": (dataset(SUBSET.replace("IMAGES", "IMAGES/../dataset.toml")), 3, ["is not a folder"]),
    "a folder without pictures": (
        lambda project: [path.unlink() for path in project.images.iterdir()],
        3,
        ["images holds no pictures", "Put pictures there"],
    ),
    "no dataset": (without("dataset_config"), 3, ["no pictures are given", "Give a dataset file"]),
    "a folder without repeats": (folder_of_pictures("mycat"), 2, ["no folder named like 10_mycat", "resolution"]),
    # ---- pictures and captions
    "a picture of 0 bytes": (picture(b""), 3, [".png", "Replace it or remove it."]),
    "a picture that is text": (picture(b"no picture"), 3, ["not a picture", "Replace it or remove it."]),
    "half of a picture": (
        lambda project: project.picture.write_bytes(project.picture.read_bytes()[:200]),
        3,
        ["cannot be decoded (truncated)", "Replace it or remove it."],
    ),
    "a picture of 1 pixel": (drawn(1, 1), 3, ["has 1x1 pixels", "too few to train on", "Replace it"]),
    "a picture of 20,000 pixels": (
        drawn(20_000, 20_000),
        3,
        ["has 20000x20000 pixels, too many", "Make it smaller than 178 megapixels."],
    ),
    "a caption in another encoding": (
        lambda project: project.picture.with_suffix(".txt").write_bytes(b"\xff\xfe\x00caf\xe9"),
        3,
        [".txt", "not UTF-8 text", "Save it as UTF-8."],
    ),
    # ---- models
    "a model that is not there": (
        option(ae="/nowhere.safetensors"),
        3,
        ["/nowhere.safetensors", "typing error", "--ae"],
    ),
    "no model": (without("ae"), 3, ["the autoencoder is not given", "Add --ae=..."]),
    "a model for another": (lambda project: project.options.update(t5xxl=project.options["clip_l"]), 3, ["--t5xxl"]),
    "a model that is text": (file("ae", "ae.safetensors", "<html>not found</html>" * 9), 3, ["ae.safetensors", "--ae"]),
    "a model of 0 bytes": (file("clip_l", "clip.safetensors", b""), 3, ["clip.safetensors", "--clip_l"]),
    "half of a model": (
        lambda project: project.options.update(
            ae=project.write("cut.safetensors", Path(project.options["ae"]).read_bytes()[:1_000_000])
        ),
        3,
        ["cut.safetensors", "not complete", "Download it again."],
    ),
    "a text encoder of another width": (narrow_t5, 3, ["32 wide, the model takes 64", "published together"]),
    "a tokenizer that is not there": (option(t5xxl_tokenizer="/nowhere/tok"), 3, ["/nowhere/tok", "tokenizer.json"]),
    "a LoRA that is not there": (option(network_weights="/nowhere.safetensors"), 3, ["--network_weights"]),
    "a LoRA that is none": (with_no_network_weights, 3, ["other.safetensors", "--network_weights"]),
    # ---- prompts and folders
    "prompts that are not there": (option(sample_prompts="/nowhere.txt"), 3, ["/nowhere.txt", "--sample_prompts"]),
    "prompts of another kind": (file("sample_prompts", "p.csv", "a cat"), 3, ["p.csv", ".txt, .toml or .json"]),
    "prompts without a prompt": (file("sample_prompts", "p.txt", "# nothing\n"), 3, ["p.txt"]),
    "a prompt with a wrong size": (file("sample_prompts", "p.txt", "a cat --w wide\n"), 3, ["p.txt", "wide"]),
    "prompts that are not TOML": (file("sample_prompts", "p.toml", "[prompt\n"), 3, ["p.toml"]),
    "prompts that are not JSON": (file("sample_prompts", "p.json", "[{"), 3, ["p.json"]),
    "no output folder": (without("output_dir"), 3, ["--output_dir"]),
    "an output folder below a file": (
        lambda project: project.options.update(output_dir=f"{project.dataset}/out"),
        3,
        ["dataset.toml is a file", "--output_dir", "Give a folder."],
    ),
}


@pytest.fixture
def project(tiny_models: TinyModels, tmp_path: Path) -> Project:
    path = make_tiny_dataset(tmp_path, count=2)
    return Project(small_run(tiny_models, path, tmp_path / "output"), [], tmp_path)


def run(project: Project) -> Answer:
    return answer(*words_of(project.options), *project.words)


def assert_refused(found: Answer, code: int, project: Project) -> None:
    assert found.code == code, found.output
    assert "Traceback" not in found.output
    assert found.seconds < SECONDS
    output = project.folder / "output"
    assert not output.exists() or not list(output.iterdir()), "nothing is left behind"


def test_there_are_enough_of_them() -> None:
    assert len(CASES) >= 60


@pytest.fixture(scope="module", autouse=True)
def loaded() -> None:
    """What a process loads once is not part of the time of an answer."""
    import trainer.train.recipe  # noqa: F401, PLC0415  # pyright: ignore[reportUnusedImport]


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_input_is_one_line_with_place_and_remedy(project: Project, name: str) -> None:
    spoil, code, pieces = CASES[name]
    spoil(project)
    found = run(project)
    assert_refused(found, code, project)
    if name != "a folder without repeats":  # which has no size either
        assert len(found.problems) == 1, found.output
    for piece in pieces:
        assert piece in "\n".join(found.problems)


def test_wrong_inputs_of_all_kinds_are_reported_together(project: Project) -> None:
    for name in (
        "a rank of nothing",
        "a misspelt option",
        "a list for a number in a file",
        "a model that is not there",
        "prompts of another kind",
        "an output folder below a file",
        "a tokenizer that is not there",
        "a picture of 0 bytes",
    ):
        CASES[name][0](project)
    second = sorted(project.images.glob("*.png"))[1]
    second.write_bytes(b"text")
    found = run(project)
    assert_refused(found, 2, project)
    assert len(found.problems) == 9, found.output
    for piece in (
        "network_dim",
        "learning_rat3",
        "seed",
        "nowhere",
        "p.csv",
        "output_dir",
        "/nowhere/tok",
        second.name,
    ):
        assert piece in "\n".join(found.problems)


@pytest.mark.parametrize(
    ("change", "pieces"),
    [
        (lambda path: Image.new("CMYK", (64, 64)).save(path.with_suffix(".jpg")), ["CMYK"]),
        (
            lambda path: Image.new("RGB", (64, 64), "red").save(
                path.with_suffix(".webp"), save_all=True, append_images=[Image.new("RGB", (64, 64), "blue")]
            ),
            ["animated"],
        ),
        (lambda path: Image.new("RGB", (64, 64)).save(path, format="JPEG"), ["ending"]),
    ],
    ids=["CMYK", "animated", "wrong ending"],
)
def test_a_picture_that_can_be_used_in_one_way_only_is_used_and_named(
    project: Project, change: Callable[[Path], object], pieces: list[str]
) -> None:
    change(project.picture)
    found = answer("check", *words_of(project.options))
    assert found.code == 0, found.output
    for piece in pieces:
        assert piece in found.output


def test_the_same_is_checked_by_the_command_for_checking(project: Project) -> None:
    project.options.update(network_dim="0", ae="/nowhere.safetensors")
    found = answer("check", *words_of(project.options))
    assert_refused(found, 2, project)
    assert len(found.problems) == 2, found.output
    assert "No problems found" not in found.output
