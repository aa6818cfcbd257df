"""The command line: words to options and back, options files, help, and every kind of mistake."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from trainer.schema.base import Problem, UserError
from trainer.schema.cli import parse_command_line, read_command_line, to_argv, validate_options, write_config
from trainer.schema.option_status import STATUS
from trainer.schema.options import Options

PUBLISHED = [
    "--pretrained_model_name_or_path",
    "X",
    "--clip_l",
    "X",
    "--t5xxl",
    "X",
    "--ae",
    "X",
    "--dataset_config",
    "X",
    "--output_dir",
    "X",
    "--output_name=my_flux_lora",
    "--save_model_as=safetensors",
    "--network_module=networks.lora",
    "--network_dim=16",
    "--network_alpha=1",
    "--learning_rate=1e-4",
    "--optimizer_type=AdamW8bit",
    "--lr_scheduler=constant",
    "--sdpa",
    "--max_train_epochs=10",
    "--save_every_n_epochs=1",
    "--mixed_precision=fp16",
    "--gradient_checkpointing",
    "--apply_t5_attn_mask",
    "--blocks_to_swap=18",
]


def parse(text: str) -> Options:
    return parse_command_line(text.split()).options


def problems(*words: str) -> tuple[Problem, ...]:
    with pytest.raises(UserError) as caught:
        parse_command_line(words)
    assert caught.value.exit_code == 2
    return caught.value.problems


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_the_published_command_is_understood() -> None:
    command = parse_command_line(PUBLISHED)
    options = command.options
    assert (options.network_module, options.network_dim, options.network_alpha) == ("networks.lora_flux", 16, 1)
    assert (options.learning_rate, options.optimizer_type, options.lr_scheduler) == (1e-4, "AdamW8bit", "constant")
    assert (options.max_train_epochs, options.save_every_n_epochs, options.blocks_to_swap) == (10, 1, 18)
    assert (options.mixed_precision, options.gradient_checkpointing, options.apply_t5_attn_mask) == ("fp16", True, True)
    assert options.clip_l == options.output_dir == Path("X")
    assert {"network_module", "learning_rate", "optimizer_type"} <= command.explicit
    assert "timestep_sampling" not in command.explicit
    assert [note.split()[0] for note in command.notes] == ["networks.lora", "sdpa"]


def test_nothing_given_gives_the_defaults() -> None:
    options = parse("")
    assert options == Options(network_module="networks.lora_flux")
    assert type(options.network_alpha) is int


@pytest.mark.parametrize(
    ("words", "name", "expected"),
    [
        ("--network_dim=8", "network_dim", 8),
        ("--network_dim 8", "network_dim", 8),
        ("--network_dim 4 --network_dim 8", "network_dim", 8),
        ("--learning 3e-4", "learning_rate", 3e-4),
        ("--gradient_ch", "gradient_checkpointing", True),
        ("--logit_mean -0.5", "logit_mean", -0.5),
        ("--logit_mean -5e-1", "logit_mean", -0.5),
        ("--logit_mean=-0.5", "logit_mean", -0.5),
        ("--network_args verbose=True rank_dropout=0.1 --seed 3", "network_args", ("verbose=True", "rank_dropout=0.1")),
        ("--network_args=verbose=True", "network_args", ("verbose=True",)),
        ("--network_args --seed 3", "network_args", ()),
        ("--text_encoder_lr 1e-5 2e-5", "text_encoder_lr", (1e-5, 2e-5)),
        ("--training_comment=--not-an-option", "training_comment", "--not-an-option"),
        ("--dev cpu", "device", "cpu"),
    ],
)
def test_words_are_split_as_argparse_does(words: str, name: str, expected: object) -> None:
    assert getattr(parse(words), name) == expected


def test_a_quoted_value_may_begin_with_a_dash() -> None:
    assert parse_command_line(["--training_comment", "- a comment"]).options.training_comment == "- a comment"


def named_by(word: str) -> set[str]:
    """The options that the word was taken for."""
    try:
        return set(parse_command_line([word]).explicit)
    except UserError as error:
        return {str(problem.field) for problem in error.problems}


def test_our_options_leave_the_references_abbreviations_as_they_are() -> None:
    """`--clip_l` is not short for `--clip_l_tokenizer`, and every shortest unique beginning finds its option."""
    assert parse("--clip_l a").clip_l == Path("a")
    reference = [name for name, status in STATUS.items() if not status.is_ours]
    for name in reference:
        starts = [name[:length] for length in range(1, len(name))]
        unique = [start for start in starts if [other for other in reference if other.startswith(start)] == [name]]
        if unique and STATUS[name].value_type != "flag" and not STATUS[name].is_list:
            assert named_by(f"--{unique[0]}") == {name}, "without its value it is a problem that names it"


@pytest.mark.parametrize(
    ("words", "what", "hint"),
    [
        (["--learning_rat3=1"], "--learning_rat3 is not a known option", "Did you mean --learning_rate?"),
        (["--zzzz", "1"], "--zzzz is not a known option", "--help lists the options."),
        (["-learning_rate=1"], "--learning_rate is not a known option", "Did you mean --learning_rate?"),
        (["--save"], "--save is not unique: --save_every_n_epochs", "Write the option in full."),
        (["--network_dim"], "network_dim needs a value", "Write --network_dim=..."),
        (["--network_dim", "--sdpa"], "network_dim needs a value", "Write --network_dim=..."),
        (["--sdpa=true"], "sdpa is a switch and takes no value, but true is given", "Write --sdpa"),
        (["--cache_latents", "true"], '"true" belongs to no option', "--cache_latents is a switch"),
        (["stray"], '"stray" belongs to no option', "needs quotes"),
        (["--training_comment", "my", "comment"], '"comment" belongs to no option', "needs quotes"),
        (["--validation_split=1"], "validation_split is 1; it must be at least 0 and below 1", ""),
    ],
)
def test_a_mistake_in_the_words_is_explained(words: list[str], what: str, hint: str) -> None:
    (found,) = problems(*words)
    assert found.what.startswith(what)
    assert hint in str(found.hint)


def test_all_problems_come_at_once() -> None:
    words = ["--network_dim=0", "--learning_rat3", "5", "--optimizer_type=Lyon", "--seed=x", "--loss_type=huber"]
    words += ["--huber_schedule=snr"]
    assert {problem.field for problem in problems(*words)} == {
        "learning_rat3",
        "optimizer_type",
        "network_dim",
        "seed",
        "huber_schedule",
    }


# -------------------------------------------------------------------------------------------------- options files


def test_the_command_line_wins_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    write(
        tmp_path / "config.toml",
        'network_dim = 8\n[any]\nlearning_rate = 3e-4\nnetwork_args = ["verbose=True"]\n[other]\nlearning_rate = 5e-4\n'
        'seed = "7"\nresolution = 512\nlr_scheduler = "cosine"\nlr_warmup_steps = "10%"\n',
    )
    command = parse_command_line(
        [f"--config_file={tmp_path / 'config'}", "--network_dim=16", "--network_args", "module_dropout=0.2"]
    )
    options = command.options
    assert (options.network_dim, options.learning_rate, options.seed) == (16, 5e-4, 7)
    assert (options.resolution, options.lr_warmup_steps) == ("512", 0.1)
    assert options.network_args == ("module_dropout=0.2",)
    assert {"network_dim", "learning_rate", "seed"} <= command.explicit


def test_a_files_values_are_checked_as_the_command_lines_are(tmp_path: Path) -> None:
    path = write(tmp_path / "config.toml", '[train]\nnetwork_dim = 0\nmixed_precision = "fp61"\ndeepspeed = true\n')
    found = problems(f"--config_file={path}", "--seed=-1")
    assert {problem.field for problem in found} == {"network_dim", "mixed_precision", "deepspeed", "seed"}
    (dim,) = [problem for problem in found if problem.field == "network_dim"]
    assert str(dim) == f"network_dim is 0; it must be 1 to 1024 ({path}, [train])."


def test_an_unknown_key_of_a_file_is_a_note_with_the_nearest_name(tmp_path: Path) -> None:
    path = write(tmp_path / "config.toml", 'netwrk_dim = 8\n[other]\nnoise_offset_type = "Original"\nqqqq = 1\n')
    command = parse_command_line([f"--config_file={path}"])
    assert command.options.network_dim is None
    assert f"netwrk_dim in {path} is not a known option and has no effect; did you mean network_dim?" in command.notes
    assert f"qqqq in {path}, [other] is not a known option and has no effect" in command.notes


def test_a_file_of_another_programs_interface_is_accepted(tmp_path: Path) -> None:
    path = write(
        tmp_path / "config.toml",
        'ae = ""\nvae = ""\ndynamo_backend = "no"\nlr_scheduler_args = []\noptimizer_args = []\nnetwork_args = []\n'
        "max_data_loader_n_workers = 0\nprior_loss_weight = 1\nmultires_noise_discount = 0.3\nmin_timestep = 0\n"
        'max_timestep = 1000\nsample_sampler = "euler_a"\nfull_bf16 = false\nvalidation_split = 0.0\n',
    )
    command = parse_command_line([f"--config_file={path}"])
    assert command.options.ae is None
    assert command.options.prior_loss_weight == 1.0


def test_a_file_that_cannot_be_read_is_a_problem_beside_the_others(tmp_path: Path) -> None:
    missing, broken = tmp_path / "nowhere", write(tmp_path / "broken.toml", "network_dim =\n")
    assert {problem.field for problem in problems(f"--config_file={missing}", "--seed=-1")} == {"config_file", "seed"}
    (found,) = problems(f"--config_file={broken}")
    assert "not valid TOML" in found.what
    assert "line 1" in found.what
    assert found.where == str(broken)


def test_a_file_cannot_name_another_file(tmp_path: Path) -> None:
    path = write(tmp_path / "config.toml", 'config_file = "other"\n')
    assert any("config_file" in note for note in parse_command_line([f"--config_file={path}"]).notes)


# ------------------------------------------------------------------------------------------------- other callers


def test_values_of_a_form_are_checked_with_their_place() -> None:
    command = validate_options({"network_dim": 8, "clip_l": Path("a"), "seed": None, "sdpa": False}, where="the form")
    assert (command.options.network_dim, command.options.clip_l) == (8, Path("a"))
    assert command.explicit == {"network_dim", "clip_l"}
    with pytest.raises(UserError) as caught:
        validate_options({"network_dim": 0, "netwrk_args": 1, "config_file": "a"}, where="the form")
    assert caught.value.exit_code == 2
    assert {problem.field for problem in caught.value.problems} == {"network_dim", "netwrk_args", "config_file"}
    assert {problem.where for problem in caught.value.problems} == {"the form"}
    assert any(problem.hint == "Did you mean network_args?" for problem in caught.value.problems)


@pytest.mark.parametrize(
    "words",
    [
        PUBLISHED,
        ["--network_alpha=1.0"],
        ["--network_alpha=2.5", "--lr_warmup_steps=10%", "--lr_scheduler=cosine", "--learning_rate=1e-4"],
        ["--network_args", "verbose=True", "in_dims=[1,2,3,4,5]", "--text_encoder_lr", "1e-5", "3e-5"],
        ["--training_comment=a = 'b' \"c\" --d", "--output_name=my lora", "--caption_separator= ", "--network_args"],
        [
            "--optimizer_args",
            "betas=(0.9,0.99)",
            "weight_decay=0.1",
            "--logit_mean=-0.25",
            "--seed=9223372036854775807",
        ],
        ["--clip_l=/a b/ü.safetensors", "--run_dir=/runs/a", "--device=cpu", "--cache_latents_to_disk"],
        ["--training_comment=", "--caption_prefix=-x"],
    ],
)
def test_options_become_words_that_give_the_same_options(words: list[str]) -> None:
    options = parse_command_line(words).options
    again = parse_command_line(to_argv(options)).options
    assert again == options
    assert type(again.network_alpha) is type(options.network_alpha)


def test_words_hold_only_what_is_not_at_its_default() -> None:
    assert to_argv(Options()) == []
    assert to_argv(Options(learning_rate=1e-4, cache_latents=True, network_args=("a=1", "b=2"))) == [
        "--network_args",
        "a=1",
        "b=2",
        "--learning_rate=0.0001",
        "--cache_latents",
    ]


# ------------------------------------------------------------------------------------------------------------ help


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["--network_dim=0", "--hel"]])
def test_help_is_written_and_ends_the_program_well(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_command_line(words)
    assert caught.value.code == 0
    text = capsys.readouterr().out
    missing = [name for name in STATUS if f"--{name}" not in text]
    assert missing == []
    assert "--device {auto,cpu,cuda,mps} [ours]" in text
    assert "--optimizer_type TEXT\n" in text
    assert "Known: AdamW, AdamW8bit, " in text
    assert "--save_model_as {safetensors}\n" in text
    assert "--network_args [TEXT ...]" in text
    assert "Default: 1600." in text
    assert max(len(line) for line in text.splitlines()) <= 200


def test_the_command_line_is_ready_in_a_moment() -> None:
    """Measured inside of the process: the processor's time for importing, beyond the start of Python itself. What other
    programs take meanwhile does not count."""
    code = (
        "import sys, time; start = time.process_time(); import trainer.schema.cli as cli; "
        "cli.parse_command_line(['--network_dim=4']); "
        "print(time.process_time() - start, *{name.partition('.')[0] for name in sys.modules})"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
        for _ in range(2)
    ]
    heavy = {"torch", "numpy", "PIL", "transformers", "safetensors", "huggingface_hub", "gradio", "httpx", "requests"}
    assert heavy & set(runs[0]) == set()
    # Three times what it takes: two threads on one core, or a low clock, count in the processor's time as well.
    assert min(float(run[0]) for run in runs) < 1.2


# ------------------------------------------------------------------------------------------------- writing a file


def test_output_config_writes_what_was_given_and_gives_it_back(tmp_path: Path) -> None:
    words = ["--network_dim=8", "--learning_rate=1e-4", "--network_args", "verbose=True", "--clip_l=a b/clip", "--sdpa"]
    words += ["--network_module=networks.lora", "--cache_latents_to_disk"]
    command = parse_command_line([*words, f"--config_file={tmp_path / 'sub' / 'mine'}", "--output_config"])
    assert write_config(command.options) == tmp_path / "sub" / "mine.toml"
    text = (tmp_path / "sub" / "mine.toml").read_text(encoding="utf-8")
    assert "config_file" not in text
    assert "output_config" not in text
    again = parse_command_line([f"--config_file={tmp_path / 'sub' / 'mine'}"])
    assert again.options == parse_command_line(words).options


def test_output_config_leaves_a_file_alone_that_exists(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.toml", "seed = 1\n")
    with pytest.raises(UserError, match="exists and is left as it is") as caught:
        write_config(parse_command_line([f"--config_file={path}", "--output_config", "--seed=2"]).options)
    assert caught.value.exit_code == 2
    assert path.read_text(encoding="utf-8") == "seed = 1\n"


def test_output_config_needs_a_name_and_is_nothing_for_a_file(tmp_path: Path) -> None:
    (found,) = problems("--output_config")
    assert (found.field, found.hint) == ("output_config", "Give its name as --config_file.")
    path = write(tmp_path / "config.toml", "output_config = true\n")
    command = parse_command_line([f"--config_file={path}"])
    assert command.options.output_config is False
    assert f"output_config in {path} has no effect: it belongs on the command line" in command.notes


def test_right_values_beside_wrong_ones_are_kept_for_further_checks() -> None:
    command = read_command_line(["--seed=x", "--network_dim=8", "--nonsense=1"])
    assert {problem.field for problem in command.problems} == {"seed", "nonsense"}
    assert (command.options.network_dim, command.options.seed) == (8, None)
    with pytest.raises(UserError, match="nonsense"):
        command.without_problems()


def test_of_what_is_given_twice_the_last_counts_and_that_is_said(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text("[a]\nseed = 1\n[b]\nseed = 2\n", encoding="utf-8")
    command = f"--config_file={config} --network_dim=4 --network_dim=8 --network_dim=8 --seed=3"
    command += " --optimizer_args weight_decay=1 weight_decay=2"
    parsed = parse_command_line(command.split())
    assert (parsed.options.network_dim, parsed.options.seed) == (8, 3)
    assert [note for note in parsed.notes if "twice" in note] == [
        "network_dim is given twice: 4 has no effect beside 8, which comes later",
        "seed is given twice: 1 has no effect beside 2, which comes later",
        "weight_decay of optimizer_args is given twice: 1 has no effect beside 2, which comes later",
    ]
