"""Saved models of a few thousand weights with their processors, as a user's folders."""

from pathlib import Path

import torch
from transformers import BertConfig

from hf_vlp import (
    VlpAlbefConfig,
    VlpAlbefImageProcessor,
    VlpAlbefProcessor,
    VlpClipConfig,
    VlpClipForPreTraining,
    VlpClipImageProcessor,
    VlpClipProcessor,
    VlpClipResNetConfig,
    VlpClipTextConfig,
    VlpClipVisionConfig,
    VlpRegionFeatureExtractor,
    VlpViltConfig,
    VlpViltImageProcessor,
    VlpViltProcessor,
    VlpVseConfig,
    VlpVseForPreTraining,
    VlpVseGridConfig,
    VlpVseImageProcessor,
    VlpVseProcessor,
)
from hf_vlp.inputs.vocabulary import train_clip_tokenizer, train_wordpiece_tokenizer, without_end_mark

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


def save_tiny_vse(folder: Path, region_size: int | None = None) -> Path:
    """VSE-infinity that sees regions of this width; without one pixels, by a grid of 32 channels."""
    tokenizer = train_wordpiece_tokenizer(WORDS, 200, 32)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=32, **sizes)
    stages = {"depths": [1, 1], "hidden_sizes": [16, 32], "bottleneck_sizes": [8, 8]}
    grid = None if region_size else VlpVseGridConfig(embedding_size=8, image_size=SIZE, **stages)
    config = VlpVseConfig(text_config=text, vision_config=grid, region_size=region_size or 1, projection_dim=24)
    torch.manual_seed(0)
    VlpVseForPreTraining(config).save_pretrained(folder)
    if region_size:
        image_side = {"feature_extractor": VlpRegionFeatureExtractor(region_size)}
    else:
        image_side = {"image_processor": VlpVseImageProcessor(size={"height": SIZE, "width": SIZE})}
    VlpVseProcessor(tokenizer=tokenizer, **image_side).save_pretrained(folder)
    return folder


def save_tiny_vilt(folder: Path, model_class: type, **fields) -> Path:
    """One stream over pictures whose shorter side has 32 pixels; `model_class` with these fields of its configuration."""
    tokenizer = train_wordpiece_tokenizer(WORDS, 200, 32)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    tables = {"vocab_size": len(tokenizer), "max_position_embeddings": 32, "image_size": SIZE, "patch_size": 8}
    torch.manual_seed(0)
    model_class(VlpViltConfig(**sizes, **tables, initializer_range=0.2, **fields)).save_pretrained(folder)
    image_processor = VlpViltImageProcessor(size={"shortest_edge": SIZE}, size_divisor=8)
    VlpViltProcessor(image_processor, tokenizer).save_pretrained(folder)
    return folder


def save_tiny_albef(folder: Path, model_class: type, **fields) -> Path:
    """Text and image encoders and three layers that fuse; `model_class` with these fields of its configuration."""
    tokenizer = without_end_mark(train_wordpiece_tokenizer(WORDS, 200, 32))
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes["initializer_range"] = 0.2
    parts = {
        "vision_config": {**sizes, "image_size": SIZE, "patch_size": 8},
        "text_config": {**sizes, "vocab_size": len(tokenizer), "max_position_embeddings": 32},
        "multimodal_config": {**sizes, "num_hidden_layers": 3},
    }
    torch.manual_seed(0)
    model_class(VlpAlbefConfig(**parts, projection_dim=8, queue_size=4, **fields)).save_pretrained(folder)
    image_processor = VlpAlbefImageProcessor(size={"height": SIZE, "width": SIZE})
    VlpAlbefProcessor(image_processor, tokenizer).save_pretrained(folder)
    return folder
