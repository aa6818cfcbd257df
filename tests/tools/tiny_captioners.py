"""Captioning models of a few thousand random weights, in the form that transformers saves and loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertLMHeadModel,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    PreTrainedTokenizerFast,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

WORDS = [
    "a",
    "red",
    "blue",
    "green",
    "cat",
    "dog",
    "on",
    "the",
    "grass",
    "sofa",
    "wall",
    "photo",
    "of",
    "what",
    "does",
    "image",
    "describe",
    "?",
    "with",
    "paragraph",
    "is",
    "shown",
    "in",
    "Describe",
    "What",
]
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<image>")
BOS, PAD, EOS, IMAGE = 0, 1, 2, 4
SIDE = 32
IMAGE_TOKENS = 17
"""Of a picture of 32 x 32: four by four places and their mean."""


def _tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate((*SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )


def make_tiny_florence(folder: Path) -> Path:
    """A Florence-2 with random weights."""
    tokenizer = _tokenizer()
    config = Florence2Config(
        vision_config={
            "depths": [1, 1],
            "patch_size": [7, 3],
            "patch_stride": [4, 2],
            "patch_padding": [3, 1],
            "patch_prenorm": [False, True],
            "embed_dim": [16, 32],
            "num_heads": [2, 2],
            "num_groups": [2, 2],
            "window_size": 4,
            "projection_dim": 32,
            "max_temporal_embeddings": 4,
            "max_position_embeddings": 16,
        },
        text_config={
            "model_type": "bart",
            "vocab_size": len(tokenizer),
            "d_model": 32,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 32,
            "decoder_ffn_dim": 32,
            "max_position_embeddings": 512,
            "bos_token_id": BOS,
            "pad_token_id": PAD,
            "eos_token_id": EOS,
            "decoder_start_token_id": EOS,
            "forced_eos_token_id": EOS,
        },
        image_token_id=IMAGE,
    )
    torch.manual_seed(1)
    Florence2ForConditionalGeneration(config).save_pretrained(folder)
    pictures: Any = CLIPImageProcessorPil(size={"height": SIDE, "width": SIDE}, do_center_crop=False)
    pictures.image_seq_length = IMAGE_TOKENS
    Florence2Processor(image_processor=pictures, tokenizer=tokenizer).save_pretrained(folder)
    return folder


def make_tiny_vision_encoder_decoder(folder: Path) -> Path:
    """A ViT that a BERT reads, with random weights: picture processor and tokenizer apart, no prompt."""
    tokenizer = _tokenizer()
    shape: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    torch.manual_seed(1)
    encoder = ViTModel(ViTConfig(image_size=SIDE, patch_size=16, **shape))
    decoder = BertLMHeadModel(
        BertConfig(vocab_size=len(tokenizer), is_decoder=True, add_cross_attention=True, pad_token_id=PAD, **shape)
    )
    model = VisionEncoderDecoderModel(encoder=encoder, decoder=decoder)
    model.config.decoder_start_token_id = BOS
    model.config.pad_token_id = PAD
    model.generation_config.decoder_start_token_id = BOS
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = EOS
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
