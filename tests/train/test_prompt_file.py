"""Sample prompts that are edited during a run."""

from __future__ import annotations

from pathlib import Path

from trainer.train.prompt_file import PromptFile, texts_of
from trainer.train.sample_prompts import SamplePrompt, read_sample_prompts


def test_edits_count_at_the_next_look_and_a_broken_one_warns_once_and_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n", encoding="utf-8")
    warnings: list[str] = []
    prompts = PromptFile(path, read_sample_prompts(path), warnings.append)
    assert texts_of(prompts()) == ["a cat"]

    path.write_text("a cat\na dog --n bad --l 4\n", encoding="utf-8")
    assert texts_of(prompts()) == ["a cat", "a dog", "bad"]

    path.write_text("a cat --w wide\n", encoding="utf-8")
    for _ in range(2):
        assert texts_of(prompts()) == ["a cat", "a dog", "bad"]
    assert len(warnings) == 1
    assert "--w (width) is wide" in warnings[0]

    path.unlink()
    for _ in range(2):
        assert len(prompts()) == 2
    assert len(warnings) == 2
    assert "cannot be read" in warnings[1]

    path.write_text("a bird\n", encoding="utf-8")
    assert [prompt.prompt for prompt in prompts()] == ["a bird"]


def test_the_negative_prompt_counts_only_with_two_passes() -> None:
    assert texts_of([SamplePrompt("a", "b"), SamplePrompt("c", "d", cfg_scale=2.0)]) == ["a", "c", "d"]
