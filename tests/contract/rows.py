"""One row for every registered (configuration, class): how to build it tiny, and what it takes.

`test_contract.py` runs every row. A new architecture joins by its rows here; `test_every_class_has_a_row` says which are missing.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from transformers import BertConfig, PreTrainedConfig, PreTrainedModel

from hf_vlp.auto import TABLE, resolve
from hf_vlp.models.clip.configuration_clip import (
    VlpClipConfig,
    VlpClipResNetConfig,
    VlpClipTextConfig,
    VlpClipVisionConfig,
)

VOCABULARY, START, END = 40, 38, 39  # the end token also pads
CLASSES = 5
WORDS = (3, 30)  # ids of ordinary words


@dataclass(frozen=True)
class Row:
    """A class in one variant.

    model: "module:Class" as in `hf_vlp.auto.TABLE`. config: builds the tiny configuration. inputs: batch keys of the forward.
    size: side R of its images, other_size: a height and width that is not the trained one. lora: projections that adapters replace.
    recorded: path in the output -> number of (hidden states, attention maps) that are recorded there.
    checkpoints: names of the classes that checkpoint themselves. no_gradient: ends of names whose gradient is zero by algebra
    (a key bias shifts all scores of a query alike).
    """

    model: str
    variant: str
    config: Callable[[], PreTrainedConfig]
    inputs: tuple[str, ...]
    size: int = 32
    other_size: tuple[int, int] = (40, 48)
    lora: tuple[str, ...] = ("q_proj", "v_proj")
    recorded: dict[str, tuple[int, int]] = field(default_factory=dict)
    checkpoints: tuple[str, ...] = ("Block",)
    no_gradient: tuple[str, ...] = ("k_proj.bias", "key.bias")

    @property
    def name(self) -> str:
        return f"{self.model.partition(':')[2]}-{self.variant}"

    @property
    def model_class(self) -> type[PreTrainedModel]:
        return resolve(self.model)

    @property
    def auto_classes(self) -> list[str]:
        """The Auto classes this class is registered on for this configuration."""
        table_row = TABLE[self.config().model_type]
        return [auto for auto, model in table_row.models.items() if model == self.model]

    @property
    def has_text(self) -> bool:
        return "input_ids" in self.inputs

    @property
    def has_image(self) -> bool:
        return "pixel_values" in self.inputs

    @property
    def own_text_tower(self) -> bool:
        return self.has_text and self.config().get_text_config().model_type.startswith("vlp_")

    def build(self, seed: int = 0, **kwargs) -> PreTrainedModel:
        """A model in evaluation mode whose every tensor differs from its initial value, so that zero and one hide nothing."""
        torch.manual_seed(seed)
        model = self.model_class._from_config(self.config(), **kwargs)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim:
                    parameter.add_(0.05 * torch.randn_like(parameter))
            norms = [module for module in model.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
            momenta = [norm.momentum for norm in norms]
            for norm in norms:
                norm.momentum = 1.0
            model.train()(**self.batch(seed=seed + 100))  # statistics of real maps, else most units are dead
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
        return model.eval()

    def batch(self, seed: int = 1, rows: int = 4, size: tuple[int, int] | None = None) -> dict[str, torch.Tensor]:
        """Random inputs: texts of different lengths padded on the right to 10, pictures, and what the class asks for besides."""
        draw = torch.Generator().manual_seed(seed)
        made = {}
        if self.has_text:
            lengths = torch.tensor([10, 6, 8, 4, 7, 9])[:rows]
            place = torch.arange(10)[None, :]
            ids = torch.randint(*WORDS, (rows, 10), generator=draw)
            ids[:, 0] = START
            made["input_ids"] = torch.where(place >= lengths[:, None] - 1, END, ids)
            made["attention_mask"] = (place < lengths[:, None]).long()
        if self.has_image:
            height, width = size or (self.size, self.size)
            made["pixel_values"] = torch.randn(rows, 3, height, width, generator=draw)
        if "image_ids" in self.inputs:
            made["image_ids"] = torch.tensor([7, 7, 8, 9, 10, 11])[:rows]
        if "labels" in self.inputs:
            made["labels"] = torch.randint(CLASSES, (rows,), generator=draw)
        return made


def text_config() -> VlpClipTextConfig:
    return VlpClipTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=START,
        eos_token_id=END,
        pad_token_id=END,
    )


def vision_config() -> VlpClipVisionConfig:
    return VlpClipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )


def resnet_config() -> VlpClipResNetConfig:
    return VlpClipResNetConfig(width=4, layers=[1, 2, 1, 1], num_attention_heads=4, image_size=64, projection_dim=24)


def bert_config() -> BertConfig:
    return BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def pair_config(text=text_config, vision=vision_config, **fields) -> Callable[[], VlpClipConfig]:
    def build() -> VlpClipConfig:
        tower = vision if isinstance(vision, str) else vision()
        return VlpClipConfig(text_config=text(), vision_config=tower, projection_dim=24, **fields)

    return build


RESNET = {"size": 64, "other_size": (96, 64), "checkpoints": ("Block", "Bottleneck")}
FOREIGN = {"lora": ("query", "value"), "checkpoints": ("BertLayer",)}
PAIR = ("input_ids", "attention_mask", "pixel_values")
TEXT, VIT, RES = "text_model_output", "vision_model_output", "vision_model_output"
TIMM = "timm/test_resnet"

MODEL, PRETRAINING = "clip.modeling_clip:VlpClipModel", "clip.modeling_clip:VlpClipForPreTraining"
CLASSIFIER = "clip.tasks_clip:VlpClipForImageClassification"

ROWS = [
    Row(
        "clip.modeling_clip:VlpClipTextModel",
        "causal",
        text_config,
        ("input_ids", "attention_mask"),
        recorded={"": (3, 2)},
    ),
    Row("clip.modeling_clip:VlpClipVisionModel", "vit", vision_config, ("pixel_values",), recorded={"": (3, 2)}),
    Row(
        "clip.modeling_clip:VlpClipResNetModel",
        "resnet",
        resnet_config,
        ("pixel_values",),
        recorded={"": (6, 1)},
        size=64,
        other_size=(96, 64),
        checkpoints=("Bottleneck",),
    ),
    Row(MODEL, "vit", pair_config(), PAIR, recorded={TEXT: (3, 2), VIT: (3, 2)}),
    Row(MODEL, "resnet", pair_config(vision=resnet_config), PAIR, recorded={TEXT: (3, 2), RES: (6, 1)}, **RESNET),
    Row(MODEL, "bert-timm", pair_config(bert_config, TIMM), PAIR, **FOREIGN),
    Row(PRETRAINING, "vit", pair_config(), (*PAIR, "image_ids")),
    Row(PRETRAINING, "resnet", pair_config(vision=resnet_config), (*PAIR, "image_ids"), **RESNET),
    Row(PRETRAINING, "plain-targets", pair_config(contrastive_targets="plain", logit_scale_max=None), PAIR),
    Row(
        PRETRAINING,
        "sigmoid",
        pair_config(contrastive_loss="sigmoid", logit_scale_init_value=2.302585),
        (*PAIR, "image_ids"),
    ),
    Row(PRETRAINING, "bert-timm", pair_config(bert_config, TIMM), (*PAIR, "image_ids"), **FOREIGN),
    Row(
        PRETRAINING,
        "bert-pooler",
        pair_config(bert_config, foreign_text_pooling="pooler"),
        PAIR,
        lora=("query", "value"),
        checkpoints=("Block", "BertLayer"),
    ),
    Row(CLASSIFIER, "vit", pair_config(num_labels=CLASSES), ("pixel_values", "labels")),
    Row(
        CLASSIFIER,
        "resnet-unit",
        pair_config(vision=resnet_config, num_labels=CLASSES, classifier_input="unit"),
        ("pixel_values", "labels"),
        size=64,
        other_size=(96, 64),
        checkpoints=("Bottleneck",),
    ),
]
