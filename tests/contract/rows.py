"""One row for every registered (configuration, class): how to build it tiny, and what it takes.

`test_contract.py` runs every row. A new architecture joins by its rows here; `test_every_class_has_a_row` says which are missing.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from transformers import BertConfig, PreTrainedConfig, PreTrainedModel

from hf_vlp.auto import TABLE, resolve
from hf_vlp.models.albef.configuration_albef import VlpAlbefConfig, VlpAlbefTextConfig, VlpAlbefVisionConfig
from hf_vlp.models.clip.configuration_clip import (
    VlpClipConfig,
    VlpClipResNetConfig,
    VlpClipTextConfig,
    VlpClipVisionConfig,
)
from hf_vlp.models.vilt.configuration_vilt import VlpViltConfig
from hf_vlp.models.vse.configuration_vse import VlpVseConfig, VlpVseGridConfig, VlpVseGruConfig

VOCABULARY, START, END = 40, 38, 39  # the end token also pads
CLASSES = 5
TEXTS = 3  # an image, in retrieval by a model that reads both sides together
WORDS = (3, 30)  # ids of ordinary words
REGION = 12  # width of a region's features


@dataclass(frozen=True)
class Row:
    """A class in one variant.

    model: "module:Class" as in `hf_vlp.auto.TABLE`. config: builds the tiny configuration. inputs: batch keys of the forward.
    size: side R of its images, other_size: a height and width that is not the trained one. cell: pixels along a cell of its grid.
    reads_both: words and image are read together, so that neither is embedded alone. aligned: each is embedded alone, and then both are
    read together to score a pair. weights: of terms of a loss, 1 if not given.
    attention: False where no layer attends. unit: False where the configuration leaves embeddings as long as they are.
    lora: projections that adapters replace, or a pattern of their names.
    begins_as: part -> the part of which it is a copy where a checkpoint has the one and not the other.
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
    cell: int = 32
    reads_both: bool = False
    aligned: bool = False
    weights: dict[str, float] = field(default_factory=dict)
    attention: bool = True
    unit: bool = True
    lora: tuple[str, ...] | str = ("q_proj", "v_proj")
    begins_as: dict[str, str] = field(default_factory=dict)
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
    def has_regions(self) -> bool:
        return "region_features" in self.inputs

    @property
    def has_pair(self) -> bool:
        return self.has_text and (self.has_image or self.has_regions)

    @property
    def text_inputs(self) -> dict[str, int]:
        """Batch keys of the text side, and what pads them."""
        pads = {"input_ids": END, "attention_mask": 0, "mlm_input_ids": END, "mlm_labels": -100}
        if self.model.endswith("ForMaskedLM"):
            pads["labels"] = -100
        return {name: value for name, value in pads.items() if name in self.inputs}

    @property
    def predicts_words(self) -> bool:
        """Also of answers, which the decoder writes with the same vocabulary."""
        return bool({"mlm_labels", "answer_ids"} & set(self.inputs)) or self.model.endswith("ForMaskedLM")

    @property
    def learns(self) -> bool:
        """Whether its batch has all that a loss needs."""
        return bool(set(LEARNT) & set(self.inputs)) or self.model.endswith("ForPreTraining")

    @property
    def mixes_rows(self) -> bool:
        """Whether a text is read with images of other rows."""
        return bool({"assignment_draws", "first_image_index"} & set(self.inputs))

    @property
    def image_inputs(self) -> tuple[str, ...]:
        """Batch keys of the image side."""
        return tuple(name for name in self.inputs if name.startswith(("pixel", "region", "grid")))

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
            if hasattr(model, "set_answers"):
                model.set_answers(*self.answers(CLASSES, torch.Generator().manual_seed(seed)))
            model.train()(**self.batch(seed=seed + 100))  # statistics of real maps, else most units are dead
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
        return model.eval()

    def batch(self, seed: int = 1, rows: int = 4, size: tuple[int, int] | None = None) -> dict[str, torch.Tensor]:
        """Random inputs: texts of different lengths padded on the right to 10, pictures or regions, and what the class asks for besides.

        Real regions and cells stand in front but for one row each, with a hole; padding is zero.
        """
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
            if "grid_mask" in self.inputs:
                made["grid_mask"] = self.sets((height // self.cell) * (width // self.cell), rows)
        if self.has_regions:
            made["region_mask"] = self.sets(6, rows)
            features = torch.randn(rows, 6, REGION, generator=draw)
            made["region_features"] = features * made["region_mask"].unsqueeze(-1)
        if "image_ids" in self.inputs:
            made["image_ids"] = torch.tensor([7, 7, 8, 9, 10, 11])[:rows]
        if "labels" in self.inputs:
            made["labels"] = torch.randint(self.config().num_labels, (rows,), generator=draw)
        if "negative_draws" in self.inputs:
            made["negative_draws"] = torch.rand(rows, 2, generator=draw)
        if "assignment_draws" in self.inputs:
            made["assignment_draws"] = torch.rand(rows, 4, generator=draw)
        if "mlm_labels" in self.inputs and not self.reads_both:
            masked = (torch.rand(rows, 10, generator=draw) < 0.4) & made["attention_mask"].bool()
            made["mlm_labels"] = torch.where(masked, made["input_ids"], -100)
            made["mlm_input_ids"] = torch.where(masked, 2, made["input_ids"])
        return self.read_together(made, draw) if self.reads_both else made

    def read_together(self, made: dict[str, torch.Tensor], draw: torch.Generator) -> dict[str, torch.Tensor]:
        """What models that read both sides together are handed: images of several sizes, the first as large as the canvas, and targets."""
        rows, height, width = len(made["input_ids"]), *made["pixel_values"].shape[-2:]
        sizes = [(height, width), (height, width - 8), (height - 8, width), (8, 16), (height, 8), (height, width)]

        def padded(sizes) -> torch.Tensor:
            mask = torch.zeros(len(sizes), height, width, dtype=torch.long)
            for row, (h, w) in enumerate(sizes):
                mask[row, :h, :w] = 1
            return mask

        made["pixel_mask"] = padded(sizes[:rows])
        if "itm_labels" in self.inputs:
            made["itm_labels"] = torch.tensor([1, 0, 0, 1, 1, 0])[:rows]
            made["itm_pixel_mask"] = padded(sizes[::-1][:rows])
            made["itm_pixel_values"] = torch.randn(rows, 3, height, width, generator=draw)
        task = "For" + self.model.partition("For")[2]
        if task == "ForVisualReasoning":
            made["labels"] = torch.tensor([1, 0, 1, 1, 0, 0])[:rows]
            made["pixel_mask"] = torch.stack([made["pixel_mask"], padded(sizes[::-1][:rows])], dim=1)
            made["pixel_values"] = torch.randn(rows, 2, 3, height, width, generator=draw)
        elif task == "ForVisualQuestionAnswering":
            made["labels"] = torch.rand(rows, CLASSES, generator=draw)
            made["answer_ids"], made["answer_mask"] = self.answers(rows, draw)
            made["answer_weights"] = torch.rand(rows, generator=draw)
            made["answer_rows"] = torch.tensor([0, 2, 1, 0, 5, 4])[:rows]
        elif task == "ForTextAssignment":
            made["first_image_index"] = torch.tensor([0, 2, 3, 3, 1, 5])[:rows]
            made["second_image_index"] = torch.tensor([1, 1, 0, 2, 0, 4])[:rows]
            made["labels"] = torch.tensor([0, 1, 2, 0, 2, 0])[:rows]
        elif task == "ForImageTextRetrieval":
            made["labels"] = torch.zeros(rows, dtype=torch.long)
            shifts = [
                torch.where(made["input_ids"] == END, END, (made["input_ids"] + 5 * k) % 25) for k in range(TEXTS)
            ]
            made["input_ids"] = torch.stack(shifts, dim=1)
            made["attention_mask"] = made["attention_mask"].unsqueeze(1).expand(-1, TEXTS, -1).contiguous()
        masked = torch.rand(made["input_ids"].shape, generator=draw) < 0.4
        masked = masked & made["attention_mask"].bool()
        if task == "ForMaskedLM":
            made["labels"] = torch.where(masked, made["input_ids"], -100)
        if "mlm_labels" in self.inputs:
            made["mlm_labels"] = torch.where(masked, made["input_ids"], -100)
            made["mlm_input_ids"] = torch.where(masked, 2, made["input_ids"])
        if "mpp_mask" in self.inputs:
            patches = (height // 8) * (width // 8)
            made["mpp_mask"], made["mpp_replace"] = (torch.rand(2, rows, patches, generator=draw) < 0.6).long()
        for name in ("pixel_values", "itm_pixel_values"):
            if name in made:
                made[name] = made[name] * made[name.replace("values", "mask")].unsqueeze(-3)
        return {name: made[name] for name in self.inputs}

    @staticmethod
    def answers(count: int, draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask [count, 5]: a start token, words, an end token, padding."""
        lengths = torch.tensor([5, 3, 4, 3, 5, 4])[:count, None]
        ids, place = torch.randint(*WORDS, (count, 5), generator=draw), torch.arange(5)[None, :]
        ids[:, 0] = START
        return torch.where(place >= lengths - 1, END, ids), (place < lengths).long()

    @staticmethod
    def sets(longest: int, rows: int) -> torch.Tensor:
        """A mask [rows, longest] of sets of different sizes."""
        sizes = longest - torch.tensor([0, 2, 1, 0, 1, 2])[:rows]
        mask = (torch.arange(longest)[None, :] < sizes[:, None]).long()
        mask[0, 1] = 0
        return mask


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


def grid_config() -> VlpVseGridConfig:
    return VlpVseGridConfig(
        embedding_size=8, depths=(1, 2, 1), hidden_sizes=(16, 24, 32), bottleneck_sizes=(8, 8, 12), image_size=32
    )


def gru_config() -> VlpVseGruConfig:
    return VlpVseGruConfig(vocab_size=VOCABULARY, embedding_size=20, hidden_size=24, num_hidden_layers=2)


def vse_config(text=bert_config, vision=None, **fields) -> Callable[[], VlpVseConfig]:
    def build() -> VlpVseConfig:
        tower = vision() if callable(vision) else vision
        sizes = {"region_size": REGION, "projection_dim": 24, "position_size": 8, "pooling_size": 6}
        return VlpVseConfig(text_config=text(), vision_config=tower, **sizes, **fields)

    return build


def vilt_config(**fields) -> Callable[[], VlpViltConfig]:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    tables = {"vocab_size": VOCABULARY, "max_position_embeddings": 16, "image_size": 32, "patch_size": 8}
    rest = {"hidden_dropout_prob": 0.0, "pad_token_id": END, "initializer_range": 0.2}
    return lambda: VlpViltConfig(**sizes, **tables, **rest, **fields)


def albef_text_config() -> VlpAlbefTextConfig:
    return VlpAlbefTextConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=16,
        pad_token_id=END,
        initializer_range=0.2,
        **LAYERS,
        **NO_DROPOUT,
    )


def albef_vision_config() -> VlpAlbefVisionConfig:
    return VlpAlbefVisionConfig(image_size=32, patch_size=8, initializer_range=0.2, **LAYERS)


def albef_config(text=albef_text_config, **fields) -> Callable[[], VlpAlbefConfig]:
    def build() -> VlpAlbefConfig:
        return VlpAlbefConfig(
            text_config=text(),
            vision_config=albef_vision_config(),
            multimodal_config=LAYERS | NO_DROPOUT,
            projection_dim=24,
            queue_size=10,
            initializer_range=0.2,
            **fields,
        )

    return build


LAYERS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
RESNET = {"size": 64, "other_size": (96, 64), "checkpoints": ("Block", "Bottleneck")}
FOREIGN = {"lora": ("query", "value"), "checkpoints": ("BertLayer",)}
PAIR = ("input_ids", "attention_mask", "pixel_values")
TEXT, VIT, RES = "text_model_output", "vision_model_output", "vision_model_output"
TIMM = "timm/test_resnet"

MODEL, PRETRAINING = "clip.modeling_clip:VlpClipModel", "clip.modeling_clip:VlpClipForPreTraining"
CLASSIFIER = "clip.tasks_clip:VlpClipForImageClassification"
VSE, VSE_PRETRAINING = "vse.modeling_vse:VlpVseModel", "vse.modeling_vse:VlpVseForPreTraining"
REGIONS = ("input_ids", "attention_mask", "region_features", "region_mask")
NONORM = {"normalize_image": False, "normalize_text": False}
SMALL = {"size": 64, "other_size": (96, 64)}
GRID = {"size": 32, "other_size": (48, 32), "cell": 16, "checkpoints": ("StridedBottleneck",)}
BERT = {"lora": ("query", "value"), "checkpoints": ("BertLayer",)}
GRU = {"attention": False, "lora": ("embeddings", "visual_projection")}

VILT, VILT_TASKS = "vilt.modeling_vilt:VlpVilt", "vilt.tasks_vilt:VlpViltFor"
BOTH = (*PAIR, "pixel_mask")
MASKED_WORDS = ("mlm_input_ids", "mlm_labels")
MATCHING = ("itm_pixel_values", "itm_pixel_mask", "itm_labels")
ALBEF, ALBEF_TASKS = "albef.modeling_albef:VlpAlbef", "albef.tasks_albef:VlpAlbefFor"
SNLI_VE = {"id2label": dict(enumerate(("contradiction", "neutral", "entailment")))}
ALIGNED = {
    "aligned": True,
    "checkpoints": ("Block", "PostNormBlock"),
    "lora": r"(?!.*teacher\.).*(q_proj|v_proj)",  # the momentum copy has no gradient
}
TOGETHER = {"reads_both": True, **{name: ALIGNED[name] for name in ("checkpoints", "lora")}}
SECOND = {"second_layers.": "albef.fusion_model.layers."}
ANSWERS = ("answer_ids", "answer_mask", "answer_weights", "answer_rows")
LEARNT = ("labels", "answer_ids", "negative_draws", "assignment_draws")
STREAM = {"reads_both": True, "recorded": {"": (3, 2)}}
TERMS = {"reads_both": True, "weights": {"wpa": 0.1}}

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
    Row(
        "vse.modeling_vse:VlpVseGridModel",
        "caffe",
        grid_config,
        ("pixel_values",),
        recorded={"": (5, 0)},
        **GRID,
        attention=False,
        lora=("conv1", "conv3"),
    ),
    Row(
        "vse.modeling_vse:VlpVseGruModel",
        "two-layers",
        gru_config,
        ("input_ids", "attention_mask"),
        attention=False,
        lora=("embeddings",),
        checkpoints=(),
    ),
    Row(VSE, "region-bert", vse_config(), REGIONS, recorded={TEXT: (3, 2)}, **BERT),
    Row(VSE, "grid-gru", vse_config(gru_config, grid_config), (*PAIR, "grid_mask"), **GRID, **GRU),
    Row(VSE, "nonorm", vse_config(gru_config, **NONORM), REGIONS, unit=False, checkpoints=(), **GRU),
    Row(VSE, "bert-timm", vse_config(bert_config, TIMM), PAIR, **SMALL, **BERT),
    Row(VSE_PRETRAINING, "region-bert", vse_config(), (*REGIONS, "image_ids"), **BERT),
    Row(VSE_PRETRAINING, "region-gru", vse_config(gru_config), (*REGIONS, "image_ids"), checkpoints=(), **GRU),
    Row(
        VSE_PRETRAINING,
        "grid-bert",
        vse_config(bert_config, grid_config, contrastive_targets="plain"),
        PAIR,
        **GRID | {"checkpoints": ("StridedBottleneck", "BertLayer")},
        lora=("query", "value"),
    ),
    Row(
        VSE_PRETRAINING,
        "grid-gru",
        vse_config(gru_config, grid_config, hardest_negatives=0.5),
        (*PAIR, "grid_mask", "image_ids"),
        **GRID,
        **GRU,
    ),
    Row(
        VSE_PRETRAINING,
        "nonorm",
        vse_config(region_norm_rows="all", hardest_negatives=0, **NONORM),
        (*REGIONS, "image_ids"),
        unit=False,
        **BERT,
    ),
    Row(VSE_PRETRAINING, "bert-timm", vse_config(bert_config, TIMM), (*PAIR, "image_ids"), **SMALL, **BERT),
    Row(f"{VILT}Model", "mixed-sizes", vilt_config(), BOTH, **STREAM),
    Row(f"{VILT}ForPreTraining", "mlm-itm-wpa", vilt_config(), (*BOTH, *MASKED_WORDS, *MATCHING, "image_ids"), **TERMS),
    Row(
        f"{VILT}ForPreTraining",
        "all",
        vilt_config(mpp_weight=1.0),
        (*BOTH, *MASKED_WORDS, *MATCHING, "mpp_mask", "mpp_replace"),
        **TERMS,
    ),
    Row(f"{VILT}ForPreTraining", "itm", vilt_config(mlm_weight=0, wpa_weight=0), (*BOTH, *MATCHING), **TERMS),
    Row(f"{VILT_TASKS}MaskedLM", "mixed-sizes", vilt_config(), (*BOTH, "labels"), **STREAM),
    Row(
        f"{VILT_TASKS}ImageTextRetrieval",
        "three-texts",
        vilt_config(),
        (*BOTH, "labels"),
        reads_both=True,
        no_gradient=("k_proj.bias", "rank_head.bias"),
    ),
    Row(
        f"{VILT_TASKS}VisualQuestionAnswering",
        "soft-scores",
        vilt_config(num_labels=CLASSES),
        (*BOTH, "labels"),
        **STREAM,
    ),
    Row(f"{VILT_TASKS}VisualReasoning", "two-images", vilt_config(), (*BOTH, "labels"), reads_both=True),
    Row(
        f"{ALBEF}TextModel",
        "first-half",
        albef_text_config,
        ("input_ids", "attention_mask"),
        recorded={"": (3, 2)},
        checkpoints=("PostNormBlock",),
    ),
    Row(f"{ALBEF}VisionModel", "vit", albef_vision_config, ("pixel_values",), recorded={"": (3, 2)}),
    Row(f"{ALBEF}Model", "fused", albef_config(), PAIR, recorded={"": (3, 2)}, **ALIGNED),
    Row(
        "albef.pretraining_albef:VlpAlbefForPreTraining",
        "all-terms",
        albef_config(),
        (*PAIR, *MASKED_WORDS, "image_ids", "negative_draws"),
        **ALIGNED,
    ),
    Row(
        "albef.pretraining_albef:VlpAlbefForImageTextRetrieval",
        "identities",
        albef_config(),
        (*PAIR, "image_ids", "negative_draws"),
        **ALIGNED,
    ),
    Row(f"{ALBEF_TASKS}MaskedLM", "pairs", albef_config(), (*PAIR, "labels"), **TOGETHER),
    Row(f"{ALBEF_TASKS}VisualEntailment", "snli-ve", albef_config(**SNLI_VE), (*PAIR, "labels"), **TOGETHER),
    Row(
        f"{ALBEF_TASKS}VisualReasoning", "shared-keys", albef_config(), (*PAIR, "labels"), **TOGETHER, begins_as=SECOND
    ),
    Row(
        f"{ALBEF_TASKS}VisualReasoning",
        "own-keys",
        albef_config(shared_image_keys=False),
        (*PAIR, "labels"),
        **TOGETHER,
        begins_as=SECOND,
    ),
    Row(
        f"{ALBEF_TASKS}TextAssignment",
        "drawn",
        albef_config(),
        (*PAIR, "assignment_draws"),
        **TOGETHER,
        begins_as=SECOND,
    ),
    Row(
        f"{ALBEF_TASKS}TextAssignment",
        "given",
        albef_config(),
        (*PAIR, "first_image_index", "second_image_index", "labels"),
        **TOGETHER,
        begins_as=SECOND,
    ),
    Row(
        "albef.answering_albef:VlpAlbefForVisualQuestionAnswering",
        "written-answers",
        albef_config(num_labels=CLASSES, answer_layers=2, answer_length=5, answer_candidates=CLASSES),
        (*PAIR, *ANSWERS),
        **TOGETHER,
        begins_as={
            "answer_decoder.layers.": "albef.fusion_model.layers.",
            "answer_decoder.embeddings.": "albef.text_model.embeddings.",
        },
    ),
]
