"""Options files and dataset files: what is read, what is refused, and what is written."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import tomlkit

from tests.data.specs import SUBSET
from trainer.schema.base import Problem, UserError
from trainer.schema.cli import parse_command_line, validate_options
from trainer.schema.dataset_advice import dataset_advice
from trainer.schema.dataset_file import dataset_config, dataset_to_toml, read_dataset_config
from trainer.schema.dataset_keys import DatasetConfig, DatasetSpec
from trainer.schema.option_files import options_to_toml, read_config_file
from trainer.schema.options import Options

REFERENCE_DEFAULTS = replace(SUBSET, image_dir=Path("cats"), caption_extension=".caption")


def options(text: str = "") -> Options:
    return parse_command_line(text.split()).options


def write(folder: Path, text: str, name: str = "dataset.toml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def read(folder: Path, text: str, command: str = "") -> DatasetConfig:
    return read_dataset_config(write(folder, text), options(command))


def problems(folder: Path, text: str, command: str = "") -> tuple[Problem, ...]:
    with pytest.raises(UserError) as caught:
        read(folder, text, command)
    assert caught.value.exit_code == 2
    assert {problem.field for problem in caught.value.problems} == {"dataset_config"}
    return caught.value.problems


def one_subset(more: str = "", general: str = "", dataset: str = "resolution = 512") -> str:
    return f'[general]\n{general}\n[[datasets]]\n{dataset}\n[[datasets.subsets]]\nimage_dir = "cats"\n{more}\n'


# -------------------------------------------------------------------------------------------------- options files


@pytest.mark.parametrize(
    "command",
    [
        "",
        "--network_alpha=1.0 --network_dim=16 --learning_rate=1e-4",
        "--clip_l=C:\\models\\clip.safetensors --output_dir=/a/ü --run_dir=/runs/x --cache_latents_to_disk",
        "--network_args verbose=True in_dims=[1,2,3,4,5] --text_encoder_lr 1e-5 3e-5 --optimizer_args weight_decay=0.1",
        "--lr_scheduler=cosine --lr_warmup_steps=10% --resolution=768,512 --seed=9223372036854775807 --logit_mean=-0.25",
        "--lr_scheduler=cosine --lr_warmup_steps=10 --loss_type=huber --huber_schedule=exponential --network_args",
    ],
)
def test_written_options_are_read_back_exactly(tmp_path: Path, command: str) -> None:
    made = options(command)
    path = write(tmp_path, options_to_toml(made), "config.toml")
    again = validate_options(read_config_file(path), where="config.toml")
    assert again.options == made
    assert {name: type(value) for name, value in again.options} == {name: type(value) for name, value in made}


def test_only_what_is_not_at_its_default_is_written() -> None:
    assert options_to_toml(Options()) == ""
    text = options_to_toml(Options(network_dim=16, learning_rate=1e-4, cache_latents=True))
    assert tomlkit.parse(text).unwrap() == {
        "network": {"network_dim": 16},
        "optimizer": {"learning_rate": 1e-4},
        "cache": {"cache_latents": True},
    }


def test_sections_of_an_options_file_mean_nothing_and_the_last_name_wins(tmp_path: Path) -> None:
    path = write(tmp_path, "seed = 1\n[a]\nnetwork_dim = 4\n[b]\nnetwork_dim = 8\n", "config.toml")
    assert read_config_file(path) == read_config_file(tmp_path / "config") == {"seed": 1, "network_dim": 8}


def test_a_dot_in_a_files_name_is_no_ending(tmp_path: Path) -> None:
    write(tmp_path, "seed = 1\n", "flux.1.toml")
    assert read_config_file(tmp_path / "flux.1") == {"seed": 1}


# -------------------------------------------------------------------------------------------------- dataset files


def test_a_short_dataset_file_gets_the_references_defaults(tmp_path: Path) -> None:
    assert read(tmp_path, one_subset()) == DatasetConfig(
        (DatasetSpec((512, 512), 1, False, 256, 1024, 64, False, 1.0, (REFERENCE_DEFAULTS,)),)
    )


def test_a_value_is_looked_up_in_subset_dataset_general_and_command_line(tmp_path: Path) -> None:
    text = """
        [general]
        keep_tokens = 1
        caption_extension = "txt"
        flip_aug = true
        batch_size = 2
        [[datasets]]
        resolution = [768, 512]
        keep_tokens = 2
        enable_bucket = true
        [[datasets.subsets]]
        image_dir = "a"
        keep_tokens = 0
        flip_aug = false
        [[datasets.subsets]]
        image_dir = "b"
        num_repeats = 3
        class_tokens = "a cat"
        is_reg = true
        [[datasets]]
        batch_size = 4
        [[datasets.subsets]]
        image_dir = "c"
        caption_dropout_rate = 1
    """
    command = "--resolution=256 --train_batch_size=8 --dataset_repeats=5 --caption_prefix=ohwx --bucket_no_upscale --keep_tokens=9"
    first, second = read(tmp_path, text, command).datasets
    assert (first.resolution, first.batch_size, first.enable_bucket, first.bucket_no_upscale) == (
        (768, 512),
        2,
        True,
        True,
    )
    assert (second.resolution, second.batch_size, second.enable_bucket) == ((256, 256), 4, False)
    a, b = first.subsets
    (c,) = second.subsets
    common = replace(REFERENCE_DEFAULTS, caption_extension=".txt", caption_prefix="ohwx")
    assert a == replace(common, image_dir=Path("a"), keep_tokens=0, flip_aug=False, num_repeats=5)
    assert b == replace(
        common, image_dir=Path("b"), keep_tokens=2, flip_aug=True, num_repeats=3, class_tokens="a cat", is_reg=True
    )
    assert c == replace(
        common, image_dir=Path("c"), keep_tokens=1, flip_aug=True, num_repeats=5, caption_dropout_rate=1.0
    )


def test_a_json_file_is_read_the_same(tmp_path: Path) -> None:
    content = {
        "general": {"batch_size": 2, "caption_prefix": None},
        "datasets": [{"resolution": 512, "subsets": [{"image_dir": "cats"}]}],
    }
    config = read_dataset_config(write(tmp_path, json.dumps(content), "dataset.json"), options())
    assert config.datasets[0].batch_size == 2
    assert config.datasets[0].subsets == (REFERENCE_DEFAULTS,)


@pytest.mark.parametrize(
    ("text", "what", "hint"),
    [
        (one_subset("num_repeat = 2"), "num_repeat is not a known key", "Did you mean num_repeats?"),
        (one_subset("caption_extention = '.txt'"), "caption_extention is not a known key", "caption_extension"),
        (one_subset(dataset="resolution = 512\ntrain_batch_size = 2"), "train_batch_size is not a known", "batch_size"),
        (one_subset(general="qqqqqq = 2"), "qqqqqq is not a known key", None),
        (one_subset() + "[dataset]\n", "dataset is not a known key", "Did you mean datasets?"),
        (one_subset("batch_size = 2"), "batch_size cannot stand here", "It belongs to [general] or [[datasets]]."),
        (one_subset(general='image_dir = "a"'), "image_dir cannot stand here", "It belongs to [[datasets.subsets]]."),
        ("resolution = 512\n" + one_subset(), "resolution cannot stand here", "[general] or [[datasets]]"),
        (one_subset(dataset="resolution = 500"), "resolution is 500; it must be a multiple of 16; 496 is near", None),
        (one_subset(dataset="resolution = [512, 500]"), "resolution is 512 500; it must be a multiple of 16", None),
        (one_subset(dataset=""), "there is no resolution", "resolution = 512"),
        (
            one_subset("num_repeats = '2'"),
            'num_repeats is "2"; it must be a whole number, 0 or more',
            "Leave the quotes out.",
        ),
        (one_subset("flip_aug = 'false'"), 'flip_aug is "false"; it must be true or false', "Leave the quotes out."),
        (one_subset("num_repeats = true"), "num_repeats is true; it must be a whole number", None),
        (one_subset("num_repeats = -1"), "num_repeats is -1; it must be a whole number", None),
        (one_subset("flip_aug = 1"), "flip_aug is 1; it must be true or false", None),
        (one_subset("caption_dropout_rate = 1.5"), "caption_dropout_rate is 1.5; it must be a number, 0 to 1", None),
        (one_subset("caption_dropout_rate = nan"), "caption_dropout_rate is nan; it must be a number, 0 to 1", None),
        (one_subset("caption_separator = ''"), "caption_separator is empty; it must be at least one character", None),
        (one_subset("caption_prefix = 3"), "caption_prefix is 3; it must be text", None),
        (one_subset("resize_interpolation = 'lanczo'"), "resize_interpolation is lanczo; it must be one of", None),
        (one_subset(general="bucket_reso_steps = 24"), "bucket_reso_steps is 24; it must be a multiple of 16", None),
        (
            one_subset(general="enable_bucket = true\nmin_bucket_reso = 2048"),
            "min_bucket_reso 2048 is above max_bucket_reso 1024",
            None,
        ),
        ("[[datasets]]\nresolution = 512\n[[datasets.subsets]]\n", "there is no image_dir", "folder of pictures"),
        ("[[datasets]]\nresolution = 512\n", "there is no [[datasets.subsets]]", "Add one."),
        ("[general]\n", "there is no [[datasets]]", "Add one."),
        ("[datasets]\nresolution = 512\n", "datasets must be a list of tables", "[[datasets]], with two brackets"),
        ("general = 3\n" + one_subset().replace("[general]", ""), "general must be a table", "[general]"),
        (one_subset("num_repeats = 0"), "no subset is left", None),
        (
            one_subset("conditioning_data_dir = 'a'"),
            "conditioning_data_dir needs the option masked_loss",
            "--masked_loss",
        ),
        (one_subset("color_aug = 1"), "color_aug is 1; it must be true or false", None),
        (
            one_subset("face_crop_aug_range = [4, 2]"),
            "face_crop_aug_range is 4 2; it must be two numbers above 0",
            None,
        ),
        (one_subset("face_crop_aug_range = 3"), "face_crop_aug_range is 3; it must be two numbers such as 2,4", None),
        (one_subset("custom_attributes = 1"), "custom_attributes is 1; it must be a table", None),
        (one_subset("picture_repeats = 2"), "picture_repeats is 2; it must be a table", None),
        (
            one_subset('picture_repeats = {"a.png" = 0}'),
            "picture_repeats is {'a.png': 0}; it must be a whole number, 1 or more, for each picture",
            None,
        ),
        (
            one_subset("custom_attributes = {diff_output_preservation = 1}"),
            "custom_attributes is {'diff_output_preservation': 1}; it must say true or false",
            None,
        ),
        (
            one_subset(general="alpha_mask = true"),
            "alpha_mask cannot stand here",
            "It belongs to [[datasets.subsets]].",
        ),
        (
            one_subset(general="network_multiplier = '1'"),
            'network_multiplier is "1"; it must be a number',
            "Leave the quotes out.",
        ),
        (one_subset("in_json = 'a.json'"), "in_json is not a known key", "Did you mean metadata_file?"),
        (
            one_subset("metadata_file = 'a.json'\nclass_tokens = 'cat'"),
            "class_tokens cannot stand beside metadata_file",
            "Captions come from that file.",
        ),
        (
            one_subset("metadata_file = 'a.json'\n[[datasets.subsets]]\nimage_dir = 'b'"),
            "some subsets of this dataset have a metadata_file and some have not",
            "[[datasets]] of their own",
        ),
        (one_subset("enable_wildcard = 1"), "enable_wildcard is 1; it must be true or false", None),
        (one_subset("token_warmup_step = -1"), "token_warmup_step is -1; it must be a number, 0 or more", None),
        (one_subset("token_warmup_step = inf"), "token_warmup_step is inf; it must be a number, 0 or more", None),
        (
            one_subset("caption_tag_dropout_rate = 2"),
            "caption_tag_dropout_rate is 2; it must be a number, 0 to 1",
            None,
        ),
        (one_subset(general="validation_split = 1"), "validation_split is 1; it must be a number, at least 0", None),
        (one_subset("validation_split = 0.1"), "validation_split", None),
    ],
)
def test_a_mistake_in_a_dataset_file_is_explained(tmp_path: Path, text: str, what: str, hint: str | None) -> None:
    (found,) = problems(tmp_path, text)
    assert found.what.startswith(what)
    assert str(tmp_path / "dataset.toml") in str(found.where)
    if hint is not None:
        assert hint in str(found.hint)


def test_all_mistakes_are_found_at_once_each_with_its_place(tmp_path: Path) -> None:
    text = (
        one_subset("num_repeat = 2\nflip_aug = 1")
        + "[[datasets]]\nresolution = 100\n[[datasets.subsets]]\nis_re = true\n"
    )
    found = problems(tmp_path, text)
    places = [str(problem.where).removeprefix(f"{tmp_path / 'dataset.toml'}, ") for problem in found]
    assert sorted(places) == [
        "[[datasets]] 1, subset 1",
        "[[datasets]] 1, subset 1",
        "[[datasets]] 2",
        "[[datasets]] 2, subset 1",
        "[[datasets]] 2, subset 1",
    ]


def test_unsupported_keys_that_change_nothing_are_accepted(tmp_path: Path) -> None:
    text = one_subset(
        "alpha_mask = false\ncolor_aug = false\ncustom_attributes = {}\n",
        general="network_multiplier = 1\nvalidation_split = 0",
    )
    assert read(tmp_path, text).datasets[0].subsets == (REFERENCE_DEFAULTS,)


def test_what_the_caches_rule_out_is_named_at_the_subset(tmp_path: Path) -> None:
    text = one_subset("shuffle_caption = true\ncaption_dropout_rate = 0.1\nrandom_crop = true")
    found = problems(tmp_path, text, "--cache_text_encoder_outputs --cache_latents")
    assert [problem.what.split()[0] for problem in found] == ["random_crop"]
    assert read(tmp_path, text).datasets[0].subsets[0].shuffle_caption


def test_a_subset_without_repeats_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = one_subset() + '[[datasets.subsets]]\nimage_dir = "dogs"\nnum_repeats = 0\n'
    with caplog.at_level(logging.WARNING, "trainer"):
        assert len(read(tmp_path, text).datasets[0].subsets) == 1
    assert "subset 2 is left out" in caplog.text


def test_a_dataset_file_that_cannot_be_read_is_explained(tmp_path: Path) -> None:
    for path, piece in (
        (tmp_path / "nowhere.toml", "does not exist"),
        (write(tmp_path, "a = ", "broken.toml"), "not valid TOML"),
        (write(tmp_path, "{", "broken.json"), "not valid JSON"),
        (write(tmp_path, "[]", "list.json"), "holds no table"),
        (write(tmp_path, "", "dataset.yaml"), "by its name"),
    ):
        with pytest.raises(UserError) as caught:
            read_dataset_config(path, options())
        assert caught.value.exit_code == 2
        assert piece in caught.value.problems[0].what
        assert caught.value.problems[0].where == str(path)
    (tmp_path / "latin.toml").write_bytes(b'a = "\xe4"')
    with pytest.raises(UserError, match=r"is not UTF-8 text .*Save it as UTF-8"):
        read_dataset_config(tmp_path / "latin.toml", options())
    with pytest.raises(UserError, match="no comma"):
        read_dataset_config(write(tmp_path, '{"datasets": [],}', "comma.json"), options())
    nothing = '{"datasets": [{"resolution": 64, "subsets": [{"image_dir": null}]}]}'
    with pytest.raises(UserError, match="there is no image_dir"):
        read_dataset_config(write(tmp_path, nothing, "null.json"), options())


def test_a_tilde_stands_for_the_users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (subset,) = read(tmp_path, one_subset().replace('"cats"', '"~/cats"')).datasets[0].subsets
    assert subset.image_dir == tmp_path / "cats"
    found = options("--output_dir=~/loras --base_weights ~/a.safetensors b.safetensors --train_data_dir=~other/x")
    assert found.output_dir == tmp_path / "loras"
    assert found.base_weights == (tmp_path / "a.safetensors", Path("b.safetensors"))
    assert found.train_data_dir == Path("~other/x")
    write(tmp_path, "seed = 7\n", "config.toml")
    assert options("--config_file=~/config.toml").seed == 7


def test_a_written_dataset_file_is_read_back(tmp_path: Path) -> None:
    values = {
        "general": {"caption_extension": ".txt", "flip_aug": None},
        "datasets": [
            {
                "resolution": "512",
                "batch_size": 2,
                "subsets": [{"image_dir": Path("C:\\cats 'n dogs"), "num_repeats": 4, "caption_prefix": 'a "b"'}],
            }
        ],
    }
    (dataset,) = read(tmp_path, dataset_to_toml(values)).datasets
    assert (dataset.resolution, dataset.batch_size) == ((512, 512), 2)
    expected = {"image_dir": Path("C:\\cats 'n dogs"), "num_repeats": 4, "caption_prefix": 'a "b"'}
    assert dataset.subsets == (replace(REFERENCE_DEFAULTS, caption_extension=".txt", **expected),)


# ------------------------------------------------------------------------------------------------------- folders


def test_folders_named_by_repeats_and_words_are_subsets(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("train/10_my cat", "train/2_dog_x", "train/plain", "train/0_none", "train/5_", "reg/1_cat"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "train" / "3_file").write_text("")
    command = f"--train_data_dir={tmp_path / 'train'} --reg_data_dir={tmp_path / 'reg'} --resolution=512 --flip_aug"
    with caplog.at_level(logging.WARNING, "trainer"):
        (dataset,) = dataset_config(options(command)).datasets
    found = [(s.place.name, s.num_repeats, s.class_tokens, s.is_reg, s.flip_aug) for s in dataset.subsets]
    assert found == [
        ("10_my cat", 10, "my cat", False, True),
        ("2_dog_x", 2, "dog_x", False, True),
        ("5_", 5, None, False, True),
        ("1_cat", 1, "cat", True, True),
    ]
    assert dataset.resolution == (512, 512)
    assert sorted(record.args[0].name for record in caplog.records if isinstance(record.args, tuple)) == [  # type: ignore[union-attr]
        "0_none",
        "plain",
    ]


@pytest.mark.parametrize(
    ("command", "code", "field", "what"),
    [
        ("--train_data_dir=nowhere --resolution=512", 3, "train_data_dir", "this folder does not exist"),
        ("--train_data_dir={0} --resolution=512", 3, "train_data_dir", "there is no folder named like 10_mycat"),
        ("--train_data_dir={0}/file --resolution=512", 3, "train_data_dir", "this is a file, not a folder"),
        ("--train_data_dir={0}/train", 2, "resolution", "resolution is not given"),
        ("", 2, "dataset_config", "no pictures are given"),
    ],
)
def test_folders_that_cannot_be_used_are_explained(
    tmp_path: Path, command: str, code: int, field: str, what: str
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "train" / "1_cat").mkdir(parents=True)
    with pytest.raises(UserError) as caught:
        dataset_config(options(command.format(tmp_path)))
    (found,) = caught.value.problems
    assert (caught.value.exit_code, found.field) == (code, field)
    assert found.what.startswith(what)


def test_options_that_the_file_overrides_everywhere_are_known(tmp_path: Path) -> None:
    command = "--resolution=768 --keep_tokens=2 --train_batch_size=4 --flip_aug --caption_extension=.txt"
    own = one_subset("keep_tokens = 3\nflip_aug = true", dataset="resolution = 512\nbatch_size = 4")
    found = read(tmp_path, own, command)
    # The same value is no news, and what one subset leaves open counts.
    assert found.overridden == ("resolution", "keep_tokens")
    more = own + '[[datasets.subsets]]\nimage_dir = "dogs"\n'
    assert read(tmp_path, more, command).overridden == ("resolution",)
    lines = list(dataset_advice(found, options(command)))
    assert "resolution 768 has no effect: the dataset file says otherwise everywhere" in lines


def test_pictures_beside_the_folders_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "2_cat").mkdir()
    (tmp_path / "loose.JPG").touch()
    with caplog.at_level(logging.WARNING, "trainer"):
        dataset_config(options(f"--train_data_dir={tmp_path} --resolution=64"))
    assert "pictures beside the folders are not used: loose.JPG" in caplog.text
