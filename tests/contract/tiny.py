"""A saved CLIP of a few thousand weights with its processor, as a user's folder."""

from pathlib import Path

import torch

from hf_vlp import (
    VlpClipConfig,
    VlpClipForPreTraining,
    VlpClipImageProcessor,
    VlpClipProcessor,
    VlpClipResNetConfig,
    VlpClipTextConfig,
    VlpClipVisionConfig,
)
from hf_vlp.inputs.vocabulary import train_clip_tokenizer

SIZE = 32
WORDS = "a red apple, a sleeping face, a ship, a picture of a boat: two dogs in the snow".split()


def clip_processor() -> VlpClipProcessor:
    size = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
    return VlpClipProcessor(VlpClipImageProcessor(**size), train_clip_tokenizer(WORDS, 600, 32))


def clip_config(tokenizer, tower: str) -> VlpClipConfig:
    text = VlpClipTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    if tower == "resnet":
        vision = VlpClipResNetConfig(
            width=8, layers=[1, 1, 1, 1], num_attention_heads=4, image_size=SIZE, projection_dim=24
        )
    else:
        vision = VlpClipVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=SIZE,
            patch_size=8,
        )
    return VlpClipConfig(text_config=text, vision_config=vision, projection_dim=24)


def save_tiny_clip(folder: Path, tower: str = "vit", model_class: type = VlpClipForPreTraining) -> Path:
    """Model and processor; the weights are the same whenever and wherever it is made."""
    processor = clip_processor()
    torch.manual_seed(0)
    model_class(clip_config(processor.tokenizer, tower)).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
