"""Tokenizers: where they come from, and what they make of prompts. Pooling and gradients of the encoders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from trainer.model.prompt_tokenizers import PromptTokenizer, load_clip_tokenizer, load_t5_tokenizer
from trainer.model.text_encoders import CLIP_MAX_TOKENS, encode_clip, encode_t5
from trainer.model.weights import load_clip_l, load_t5xxl
from trainer.schema.base import UserError

PROMPT = "a photo of a red square"


@pytest.fixture
def clip_tokenizer(golden: Path) -> PromptTokenizer:
    return load_clip_tokenizer(golden / "tokenizer_clip.json")


@pytest.fixture
def t5_tokenizer(golden: Path) -> PromptTokenizer:
    return load_t5_tokenizer(golden / "tokenizer_t5.json")


def test_prompts_are_cut_and_padded_to_the_length(
    clip_tokenizer: PromptTokenizer, t5_tokenizer: PromptTokenizer
) -> None:
    for tokenizer, end, pad in ((clip_tokenizer, 763, 763), (t5_tokenizer, 1, 0)):
        ids, mask = tokenizer.encode([PROMPT, "word " * 100], 12)
        assert ids.shape == mask.shape == (2, 12)
        assert ids.dtype == mask.dtype == torch.int64
        assert mask[1].tolist() == [1] * 12
        assert ids[1, -1] == end
        num_real = int(mask[0].sum())
        assert ids[0, num_real - 1] == end
        assert ids[0, num_real:].tolist() == [pad] * (12 - num_real)


def test_the_length_may_change_between_calls(t5_tokenizer: PromptTokenizer) -> None:
    short, _ = t5_tokenizer.encode([PROMPT], 4)
    long, _ = t5_tokenizer.encode([PROMPT], 64)
    assert short.shape == (1, 4)
    assert long.shape == (1, 64)


def test_no_prompts_give_an_empty_batch(t5_tokenizer: PromptTokenizer) -> None:
    ids, mask = t5_tokenizer.encode([], 8)
    assert ids.shape == mask.shape == (0, 8)


def test_a_folder_serves_as_well_as_its_file(golden: Path, tmp_path: Path, t5_tokenizer: PromptTokenizer) -> None:
    shutil.copy(golden / "tokenizer_t5.json", tmp_path / "tokenizer.json")
    from_folder = load_t5_tokenizer(str(tmp_path))
    assert torch.equal(from_folder.encode([PROMPT], 16)[0], t5_tokenizer.encode([PROMPT], 16)[0])


def test_a_folder_with_vocabulary_files_is_converted(
    golden: Path, tmp_path: Path, clip_tokenizer: PromptTokenizer
) -> None:
    model = json.loads((golden / "tokenizer_clip.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [" ".join(pair) for pair in model["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    converted = load_clip_tokenizer(tmp_path)
    assert torch.equal(converted.encode([PROMPT], 77)[0], clip_tokenizer.encode([PROMPT], 77)[0])


def test_the_kept_tokenizer_is_used_when_none_is_named(golden: Path, tmp_path: Path) -> None:
    for name, file in (
        ("openai_clip-vit-large-patch14", "tokenizer_clip.json"),
        ("google_t5-v1_1-xxl", "tokenizer_t5.json"),
    ):
        (tmp_path / name).mkdir()
        shutil.copy(golden / file, tmp_path / name / "tokenizer.json")
    assert load_clip_tokenizer(None, tmp_path).vocab_size == 764
    assert load_t5_tokenizer(None, tmp_path).vocab_size == 242


def test_a_diffusers_folder_brings_its_tokenizers(golden: Path, tmp_path: Path) -> None:
    for name, file in (("tokenizer", "tokenizer_clip.json"), ("tokenizer_2", "tokenizer_t5.json")):
        (tmp_path / name).mkdir()
        shutil.copy(golden / file, tmp_path / name / "tokenizer.json")
    clip_file = tmp_path / "text_encoder" / "model.safetensors"
    t5_file = tmp_path / "text_encoder_2" / "model.safetensors"
    for file in (clip_file, t5_file):
        file.parent.mkdir()
    assert load_clip_tokenizer(None, None, encoder_file=clip_file).vocab_size == 764
    assert load_t5_tokenizer(None, None, encoder_file=t5_file).vocab_size == 242


def test_a_chroma_folder_brings_the_tokenizer_of_t5(golden: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    shutil.copy(golden / "tokenizer_t5.json", tmp_path / "tokenizer" / "tokenizer.json")
    (tmp_path / "text_encoder").mkdir()
    found = load_t5_tokenizer(None, encoder_file=tmp_path / "text_encoder" / "model.safetensors")
    assert found.identity == load_t5_tokenizer(golden / "tokenizer_t5.json").identity


def test_a_tokenizer_of_the_other_encoder_beside_the_file_is_passed_over(golden: Path, tmp_path: Path) -> None:
    shutil.copy(golden / "tokenizer_t5.json", tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match="clip_l_tokenizer"):
        load_clip_tokenizer(None, None, encoder_file=tmp_path / "clip_l.safetensors")
    assert load_t5_tokenizer(None, None, encoder_file=tmp_path / "t5xxl.safetensors").vocab_size == 242


def test_without_network_one_error_says_which_option_to_set(tmp_path: Path) -> None:
    # tests/conftest.py switches the hub off.
    with pytest.raises(UserError) as caught:
        load_t5_tokenizer(None, tmp_path)
    (problem,) = caught.value.problems
    assert "google/t5-v1_1-xxl" in problem.what
    assert problem.field == "t5xxl_tokenizer"
    assert problem.hint is not None
    assert "--t5xxl_tokenizer" in problem.hint
    assert "--tokenizer_cache_dir" in problem.hint
    assert caught.value.exit_code == 3
    assert not any(tmp_path.iterdir())


def test_what_is_no_tokenizer_is_refused(golden: Path, tmp_path: Path) -> None:
    bad = tmp_path / "tokenizer.json"
    bad.write_text("{}")
    for spec in (bad, tmp_path, golden / "tokenizer_t5.json", golden):
        with pytest.raises(UserError, match="not a CLIP-L tokenizer"):
            load_clip_tokenizer(spec)
    with pytest.raises(UserError, match="does not exist"):
        load_clip_tokenizer(tmp_path / "none.json")


# --------------------------------------------------------------------------------------------------------- encoders


def test_pooling_takes_the_first_end_token(golden: Path, clip_tokenizer: PromptTokenizer) -> None:
    model = load_clip_l(golden / "model_clip_l.safetensors", torch.float32, "cpu")
    ids, mask = clip_tokenizer.encode([PROMPT], CLIP_MAX_TOKENS)
    hidden = model(input_ids=ids).last_hidden_state
    assert torch.equal(encode_clip(model, ids), hidden[:, int(mask.sum()) - 1])


def test_pooling_does_not_depend_on_the_padding(golden: Path, clip_tokenizer: PromptTokenizer) -> None:
    model = load_clip_l(golden / "model_clip_l.safetensors", torch.float32, "cpu")
    short, _ = clip_tokenizer.encode([PROMPT], 16)
    full, _ = clip_tokenizer.encode([PROMPT], CLIP_MAX_TOKENS)
    torch.testing.assert_close(encode_clip(model, short), encode_clip(model, full), atol=1e-6, rtol=0)


def test_gradients_reach_a_linear_of_clip(golden: Path, clip_tokenizer: PromptTokenizer) -> None:
    model = load_clip_l(golden / "model_clip_l.safetensors", torch.float32, "cpu")
    weight = next(module for module in model.modules() if isinstance(module, nn.Linear)).weight.requires_grad_()
    ids, _ = clip_tokenizer.encode([PROMPT, "a cat"], CLIP_MAX_TOKENS)
    encode_clip(model, ids).square().sum().backward()
    assert weight.grad is not None
    assert weight.grad.abs().max() > 0


def test_padding_hidden_inside_t5_changes_nothing_for_real_tokens_cut_there(golden: Path) -> None:
    model = load_t5xxl(golden / "model_t5xxl.safetensors", torch.float32, "cpu")
    te = load_file(golden / "te.safetensors")
    ids, mask = te["t5_input_ids"][:1], te["t5_attention_mask"][:1]
    num_real = int(mask.sum())
    with torch.no_grad():
        masked = encode_t5(model, ids, mask, apply_mask=True)
        cut = encode_t5(model, ids[:, :num_real], mask[:, :num_real], apply_mask=False)
        plain = encode_t5(model, ids, mask, apply_mask=False)
    torch.testing.assert_close(masked[:, :num_real], cut, atol=1e-5, rtol=0)
    assert not torch.allclose(plain[:, :num_real], cut, atol=1e-3)
