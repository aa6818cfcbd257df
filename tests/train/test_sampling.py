"""Prompt files with all their flags and mistakes, and the sampler on flows with a known end and on tiny models."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.tiny import TinyModels
from trainer.model.weights import load_autoencoder, load_flux
from trainer.schema.base import Problem, UserError
from trainer.train.conditioning import TextInputs
from trainer.train.objective import predict_velocity
from trainer.train.sample_prompts import SamplePrompt, parse_prompt_line, read_sample_prompts
from trainer.train.sampling import draw_sample, initial_noise, sample_file_name, save_picture, to_picture

CPU = torch.device("cpu")


def parse(line: str) -> SamplePrompt:
    problems: list[Problem] = []
    prompt = parse_prompt_line(line, where="prompts.txt, line 1", problems=problems)
    assert problems == []
    assert prompt is not None
    return prompt


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def problems_of(path: Path) -> tuple[Problem, ...]:
    with pytest.raises(UserError) as caught:
        read_sample_prompts(path)
    assert caught.value.exit_code == 3
    assert {problem.field for problem in caught.value.problems} == {"sample_prompts"}
    return caught.value.problems


# ------------------------------------------------------------------------------------------------------ prompt files


def test_a_bare_prompt_has_the_references_defaults_and_leaves_guidance_to_the_model() -> None:
    assert parse("a cat") == SamplePrompt("a cat", "", 512, 512, None, 20, None, 1.0, ())


def test_every_flag_is_read_in_any_case_and_order() -> None:
    prompt = parse("a cat --n ugly, blurry --W 768 --h 1024 --d 7 --s 28 --G 2.5 --l 4")
    assert prompt == SamplePrompt("a cat", "ugly, blurry", 768, 1024, 7, 28, 2.5, 4.0)
    assert prompt.uses_negative_prompt


def test_flags_of_other_models_are_accepted_and_named() -> None:
    prompt = parse("a cat --ss euler --cn pose.png --ctr 0.5 --rcfg 1.0 --fs 3")
    assert prompt.unused_flags == (
        "--ss (sample_sampler)",
        "--cn (controlnet_image)",
        "--ctr (cfg_trunc_ratio)",
        "--rcfg (renorm_cfg)",
        "--fs (flow_shift)",
    )


def test_sizes_are_rounded_down_to_16_and_up_to_64() -> None:
    prompt = parse("a cat --w 511 --h 20")
    assert (prompt.width, prompt.height) == (496, 64)


@pytest.mark.parametrize("text", ["a cat -- in profile", "a well-made cat", "x--y", "rock -- paper -- 2 scissors"])
def test_dashes_of_the_prose_are_no_flags(text: str) -> None:
    assert parse(f"{text} --w 256") == SamplePrompt(text, width=256)


def test_comments_and_empty_lines_are_skipped_and_order_is_kept(tmp_path: Path) -> None:
    text = "\ufeff# my prompts\nfirst --d 1\n\n  \nsecond\r\n#third\n"
    assert read_sample_prompts(write(tmp_path / "p.txt", text)) == [
        SamplePrompt("first", seed=1),
        SamplePrompt("second"),
    ]


def test_all_mistakes_of_a_file_are_reported_with_their_lines(tmp_path: Path) -> None:
    path = write(
        tmp_path / "p.txt",
        "good\na cat --width 512\n# comment\nb --w wide --s 0\n--w 512\nc --w 1 --w 2\nd --d -1\ne --g inf --h 5 6\n",
    )
    assert [(problem.what, problem.where) for problem in problems_of(path)] == [
        ("the prompt has an unknown flag --width", f"{path}, line 2"),
        ("--w (width) is wide; it must be a whole number from 1 to 16384", f"{path}, line 4"),
        ("--s (sample_steps) is 0; it must be a whole number from 1 to 1000", f"{path}, line 4"),
        ("the prompt has no text", f"{path}, line 5"),
        ("the prompt has --w twice", f"{path}, line 6"),
        (f"--d (seed) is -1; it must be a whole number from 0 to {2**63 - 1}", f"{path}, line 7"),
        ("--h (height) is 5 6; it must be a whole number from 1 to 16384", f"{path}, line 8"),
        ("--g (guidance_scale) is inf; it must be a number", f"{path}, line 8"),
    ]


def test_a_toml_file_shares_values_and_a_subset_wins(tmp_path: Path) -> None:
    path = write(
        tmp_path / "p.toml",
        '[prompt]\nwidth = 256\nseed = 3\nguidance_scale = 4\n\n[[prompt.subset]]\nprompt = "a cat"\n\n'
        '[[prompt.subset]]\nprompt = "a dog --w 5"\nwidth = 320\nscale = 2.5\nnegative_prompt = "bad"\n',
    )
    assert read_sample_prompts(path) == [
        SamplePrompt("a cat", width=256, seed=3, guidance_scale=4.0),
        SamplePrompt("a dog --w 5", "bad", width=320, seed=3, guidance_scale=4.0, cfg_scale=2.5),
    ]


def test_a_toml_file_may_hold_one_prompt_without_subsets(tmp_path: Path) -> None:
    assert read_sample_prompts(write(tmp_path / "p.toml", '[prompt]\nprompt = "a cat"\n')) == [SamplePrompt("a cat")]


def test_a_json_file_holds_lines_and_objects(tmp_path: Path) -> None:
    path = write(tmp_path / "p.json", '["a cat --s 4", {"prompt": "a dog", "sample_steps": 8, "seed": null}]')
    assert read_sample_prompts(path) == [SamplePrompt("a cat", num_steps=4), SamplePrompt("a dog", num_steps=8)]


@pytest.mark.parametrize(
    ("name", "text", "what", "where"),
    [
        ("p.json", '["a", {"prompt": "b", "widht": 5}]', "the prompt has an unknown key widht", ", entry 2"),
        ("p.json", '[{"prompt": 5}]', "prompt is 5; it must be a text", ", entry 1"),
        ("p.json", '[{"prompt": "a", "seed": true}]', "--d (seed) is True", ", entry 1"),
        ("p.json", "[5]", "the entry is neither a text nor a table of values", ", entry 1"),
        ("p.json", '{"prompt": "a"}', "the prompt file does not hold a list", ""),
        ("p.json", "[", "the prompt file is not JSON", ""),
        ("p.toml", "[prompt", "the prompt file is not TOML", ""),
        ("p.toml", "a = 1", "the prompt file has no [prompt] table", ""),
        ("p.toml", "[prompt]\nsubset = 1", "prompt.subset is not a list of tables", ""),
        ("p.toml", '[prompt]\n[[prompt.subset]]\nprompt=""', "the prompt has no text", ", prompt.subset 1"),
        ("p.txt", "# nothing", "the prompt file holds no prompt", ""),
        ("p.md", "a cat", "a prompt file ends in .txt, .toml or .json", ""),
    ],
)
def test_files_of_the_wrong_shape_are_explained(tmp_path: Path, name: str, text: str, what: str, where: str) -> None:
    path = write(tmp_path / name, text)
    (problem,) = problems_of(path)
    assert problem.what.startswith(what)
    assert problem.where == f"{path}{where}"


def test_a_file_that_is_missing_or_no_text_is_explained(tmp_path: Path) -> None:
    assert "cannot be read" in problems_of(tmp_path / "none.txt")[0].what
    (tmp_path / "p.txt").write_bytes(b"caf\xe9")
    assert "not UTF-8" in problems_of(tmp_path / "p.txt")[0].what


# ------------------------------------------------------------------------------------------------------ the sampler


def text_of(value: float, *, masked: bool = False) -> TextInputs:
    mask = torch.tensor([[1, 1, 0]]) if masked else None
    return TextInputs(torch.full((1, 3, 8), value), torch.full((1, 4), value), mask)


def draw(
    prompt: SamplePrompt,
    predict: Callable[[Tensor, Tensor, TextInputs, float], Tensor],
    *,
    decode: Callable[[Tensor], Tensor] = lambda latents: latents[:, :3],
    negative_text: TextInputs | None = None,
    is_schnell: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
    check_commands: Callable[[], None] = lambda: None,
    masked: bool = False,
) -> Image.Image:
    return draw_sample(
        prompt,
        seed=5 if prompt.seed is None else prompt.seed,
        predict=predict,
        decode=decode,
        text=text_of(1.0, masked=masked),
        negative_text=negative_text,
        is_schnell=is_schnell,
        device=CPU,
        progress=progress,
        check_commands=check_commands,
    )


def test_the_true_velocity_of_one_picture_leads_from_the_noise_to_it() -> None:
    prompt = SamplePrompt("a cat", width=64, height=96, seed=11, num_steps=7)
    target = torch.full((1, 16, 12, 8), 0.25)
    ends: list[Tensor] = []

    def decode(latents: Tensor) -> Tensor:
        ends.append(latents)
        return latents[:, :3]

    noise = initial_noise(prompt, 11)
    draw(prompt, lambda latents, timesteps, text, guidance: noise - target, decode=decode)
    assert noise.shape == target.shape
    torch.testing.assert_close(ends[0], target, atol=1e-6, rtol=0)


def test_the_model_gets_the_shifted_schedule_and_the_guidance_and_schnell_the_even_one() -> None:
    seen: list[tuple[float, float]] = []

    def predict(latents: Tensor, timesteps: Tensor, text: TextInputs, guidance: float) -> Tensor:
        assert timesteps.shape == (1,)
        seen.append((timesteps.item(), guidance))
        return torch.zeros_like(latents)

    prompt = SamplePrompt("a cat", width=256, height=256, num_steps=4, guidance_scale=2.0)
    draw(prompt, predict)
    # 256 tokens: mu is 0.5.
    shift = 1.6487212707
    expected = [shift * t / (1 + (shift - 1) * t) for t in (1.0, 0.75, 0.5, 0.25)]
    assert [timestep for timestep, _ in seen] == pytest.approx(expected, abs=1e-6)
    assert {guidance for _, guidance in seen} == {2.0}
    seen.clear()
    draw(prompt, predict, is_schnell=True)
    assert [timestep for timestep, _ in seen] == [1.0, 0.75, 0.5, 0.25]


def test_the_negative_prompt_pushes_away_by_the_cfg_scale() -> None:
    """A model whose velocity is its text: wanted 1, unwanted -2, so that a scale of 3 gives 7."""
    ends: list[Tensor] = []

    def predict(latents: Tensor, timesteps: Tensor, text: TextInputs, guidance: float) -> Tensor:
        assert latents.shape[0] == timesteps.shape[0] == 2
        assert text.mask is not None
        assert text.mask.shape == (2, 3)
        return text.vec[:, :1, None, None].expand_as(latents)

    def decode(latents: Tensor) -> Tensor:
        ends.append(latents)
        return latents[:, :3]

    prompt = SamplePrompt("a cat", "bad", width=64, height=64, seed=1, num_steps=3, cfg_scale=3.0)
    draw(prompt, predict, decode=decode, negative_text=text_of(-2.0, masked=True), masked=True)
    torch.testing.assert_close(ends[0], initial_noise(prompt, 1) - 7.0, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="its encoding is needed"):
        draw(prompt, predict)


def test_prompts_of_different_lengths_make_one_batch_with_the_rest_hidden() -> None:
    """The text mask cuts each prompt to its own length."""
    seen: list[TextInputs] = []

    def predict(latents: Tensor, timesteps: Tensor, text: TextInputs, guidance: float) -> Tensor:
        seen.append(text)
        return latents

    prompt = SamplePrompt("a cat", "bad", width=64, height=64, seed=1, num_steps=1, cfg_scale=3.0)
    longer = TextInputs(torch.ones(1, 5, 8), torch.ones(1, 4), None)
    draw(prompt, predict, negative_text=longer)
    assert seen[0].txt.shape == (2, 5, 8)
    assert seen[0].mask is not None
    assert seen[0].mask.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]


@pytest.mark.parametrize(("given", "expected"), [(None, 3.5), (0.0, 0.0), (2.0, 2.0)])
def test_a_prompt_without_guidance_is_drawn_with_the_usual_one(given: float | None, expected: float) -> None:
    seen: list[float] = []

    def predict(latents: Tensor, timesteps: Tensor, text: TextInputs, guidance: float) -> Tensor:
        seen.append(guidance)
        return latents

    draw(SamplePrompt("a cat", width=64, height=64, seed=1, num_steps=1, guidance_scale=given), predict)
    assert seen == [expected]


def test_progress_and_commands_come_after_every_step_and_may_end_it() -> None:
    calls: list[tuple[int, int]] = []
    prompt = SamplePrompt("a cat", width=64, height=64, num_steps=5)

    class Stop(Exception):
        pass

    def stop_after_two() -> None:
        if len(calls) == 2:
            raise Stop

    with pytest.raises(Stop):
        draw(
            prompt,
            lambda latents, timesteps, text, guidance: latents,
            progress=lambda done, total: calls.append((done, total)),
            check_commands=stop_after_two,
        )
    assert calls == [(1, 5), (2, 5)]


def test_tiny_models_give_the_same_picture_from_the_same_seed_and_leave_random_state_alone(
    tiny_models: TinyModels,
) -> None:
    flux = load_flux(tiny_models.flux_dev, torch.float32, "cpu").eval()
    autoencoder = load_autoencoder(tiny_models.ae, torch.float32, "cpu")
    generator = torch.Generator().manual_seed(2)
    text = TextInputs(
        torch.randn(1, 6, flux.params.context_in_dim, generator=generator),
        torch.randn(1, flux.params.vec_in_dim, generator=generator),
        torch.tensor([[1, 1, 1, 1, 0, 0]]),
    )

    def picture(seed: int, cfg_scale: float) -> Image.Image:
        return draw_sample(
            SamplePrompt("a cat", width=96, height=64, num_steps=3, cfg_scale=cfg_scale),
            seed=seed,
            predict=functools.partial(predict_velocity, flux),
            decode=autoencoder.decode,
            text=text,
            negative_text=text,
            is_schnell=False,
            device=CPU,
            progress=lambda done, total: None,
            check_commands=lambda: None,
        )

    state = torch.get_rng_state()
    first = picture(7, 1.0)
    assert first.size == (96, 64)
    assert first.mode == "RGB"
    assert first.tobytes() == picture(7, 1.0).tobytes()
    assert first.tobytes() != picture(8, 1.0).tobytes()
    # Away from the same prompt is nowhere; a batch of two may round differently.
    other = picture(7, 5.0)
    difference = max(abs(a - b) for a, b in zip(first.tobytes(), other.tobytes(), strict=True))
    assert difference <= 2
    assert torch.equal(torch.get_rng_state(), state)


def test_pictures_are_clipped_and_truncated_to_eight_bits() -> None:
    image = torch.tensor([-2.0, -1.0, 0.0, 0.999, 3.0]).expand(3, 1, 5)
    assert list(to_picture(image).tobytes())[::3] == [0, 0, 127, 254, 255]


def test_a_picture_of_nan_is_an_explained_failure() -> None:
    with pytest.raises(UserError, match=r"NaN.*range of numbers"):
        to_picture(torch.full((3, 4, 4), float("nan")))


def test_file_names_are_the_references() -> None:
    moment = time.mktime((2026, 1, 14, 20, 31, 12, 0, 0, -1))
    by_epoch = sample_file_name("cat", step=120, epoch=3, index=2, moment=moment, seed=42)
    assert by_epoch == "cat_e000003_02_20260114203112_42.png"
    by_step = sample_file_name(None, step=120, epoch=None, index=0, moment=moment, seed=None)
    assert by_step == "000120_00_20260114203112.png"


def test_a_saved_picture_is_a_whole_png(tmp_path: Path) -> None:
    picture = to_picture(torch.zeros(3, 8, 16))
    save_picture(tmp_path / "samples" / "a.png", picture)
    with Image.open(tmp_path / "samples" / "a.png") as loaded:
        assert (loaded.format, loaded.size, loaded.getpixel((3, 3))) == ("PNG", (16, 8), (127, 127, 127))
    assert [entry.name for entry in (tmp_path / "samples").iterdir()] == ["a.png"]
