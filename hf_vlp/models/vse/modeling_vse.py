"""VSE-infinity: sets of regions or grid cells and of words, pooled by learned weights into one space.

Paper: "Learning the Best Pooling Strategy for Visual Semantic Embedding", https://arxiv.org/abs/2011.04305.

Differences from the released code:
1. In training, the batch norm of the regions' MLP takes its statistics over the real regions; the original also over the zero rows
   that pad them, so that padding changes the result (`region_norm_rows="all"` restores it; the paper's recipes set it).
2. The second batch norm of that MLP, the pooler of BERT and the classifier of the CNN are saved by the original and never used;
   they do not exist here. Converting back writes the first as it was initialised and leaves out the other two.
3. Real elements may stand anywhere in a set; the original needs them in front. A set without any is an error.
4. With `image_ids` in the batch, a caption of the same image is never a negative (`contrastive_targets="plain"` restores the paper's).
5. The loss may mix all and the hardest negatives by a share; the original switches from one to the other.
6. Captions of any order in a batch for the BiGRU; the original needs them sorted by length.
7. Any text encoder of transformers and any image encoder of transformers or timm can be a tower.
8. Weights of the pooling are computed once for each length in the batch, not for each sample. Exact.
9. On a CPU, captions of similar length run through the text encoder together, without most of the padding. Exact.
"""

import re
from collections.abc import Callable

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from hf_vlp.distributed import gather_with_gradient, gather_without_gradient, rank, world_size
from hf_vlp.layers.attention import AttendsInAnyWay
from hf_vlp.layers.bottleneck_resnet import SMALLEST, BottleneckResNet, StridedBottleneck
from hf_vlp.layers.initialization import InitializesEveryModule, torch_default_
from hf_vlp.layers.normalization import MaskedBatchNorm, keep_statistics
from hf_vlp.layers.pooling import GeneralizedPooling, refuse_empty, refuse_padding_before, unit_rows
from hf_vlp.layers.recurrent import BidirectionalGRU
from hf_vlp.layers.towers import LoadsOutOfAPair, build_tower, fill_tower, require_pairs, token_states, tower_width
from hf_vlp.models.vse.configuration_vse import VlpVseConfig, VlpVseGridConfig, VlpVseGruConfig
from hf_vlp.objectives.triplet import collapsed_loss, triplet_loss
from hf_vlp.outputs import DualEncoderOutput, PreTrainingOutput

NORM_EPS = 1e-8  # added to the norm of an embedding, `l2norm` of the released code
STAGE = re.compile(r"\blayer(\d+)\.")  # of a parameter of a ResNet, also of timm's; the stem has none


class VlpVsePreTrainedModel(InitializesEveryModule, AttendsInAnyWay, PreTrainedModel):
    """Initialisation and capabilities of every VSE-infinity class."""

    config: VlpVseConfig
    base_model_prefix = "vse"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _no_split_modules = ["StridedBottleneck"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """torch's defaults, as the released code has them but for what the classes below say."""
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            torch_default_(module)
        elif isinstance(module, BidirectionalGRU):
            module.reset_parameters()


class VlpVseTower(LoadsOutOfAPair, VlpVsePreTrainedModel):
    """One tower alone: it also loads its part out of a folder that holds the whole model."""

    pair_prefix = "vse"
    pair_parts = ("text_model", "text_projection", "text_pooling", "vision_model", "visual_projection", "visual_pooling", "region_mlp")


class VlpVseGridModel(VlpVseTower):
    """The convolutional tower of the grid variants: a ResNet or ResNeXt without pooling and classifier."""

    config: VlpVseGridConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _can_record_outputs = {"hidden_states": StridedBottleneck}

    def __init__(self, config: VlpVseGridConfig):
        super().__init__(config)
        sizes = (config.embedding_size, config.depths, config.hidden_sizes, config.bottleneck_sizes)
        self.resnet = BottleneckResNet(*sizes, config.groups, config.graph, config.num_channels)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """He et al. 2015: what ResNets are trained from; published weights replace it in the paper."""
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def train(self, mode: bool = True) -> "VlpVseGridModel":
        """As in torch; batch norms stay in evaluation mode where the configuration freezes them."""
        super().train(mode)
        if self.config.freeze_norms:
            keep_statistics(self)
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self.resnet.conv1

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> BaseModelOutput:
        """`pixel_values` [B, 3, H, W] -> `last_hidden_state` [B, D, h, w], h and w about H / 32 and W / 32.

        Raises:
            ValueError: for an image smaller than 16 pixels or with another number of channels.
        """
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.config.num_channels or min(pixel_values.shape[-2:]) < SMALLEST:
            raise ValueError(
                f"pixel_values must be [B, {self.config.num_channels}, H, W] with H and W of {SMALLEST} or more, "
                f"got shape {tuple(pixel_values.shape)}"
            )
        return BaseModelOutput(last_hidden_state=self.resnet(pixel_values))


class VlpVseGruModel(VlpVseTower):
    """The text tower of the BiGRU variants: word vectors, and the mean of a GRU's two directions at every word."""

    config: VlpVseGruConfig
    base_model_prefix = "text_model"
    main_input_name = "input_ids"
    input_modalities = ("text",)
    supports_gradient_checkpointing = False

    def __init__(self, config: VlpVseGruConfig):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.embedding_size)
        self.gru = BidirectionalGRU(config.embedding_size, config.hidden_size, config.num_hidden_layers)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, nn.Embedding):
            init.uniform_(module.weight, -0.1, 0.1)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings

    def set_input_embeddings(self, value: nn.Embedding):
        self.embeddings = value

    @merge_with_config_defaults
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput:
        """`input_ids` [B, L] padded on the right (or their embeddings), `attention_mask` [B, L] -> `last_hidden_state` [B, L, D].

        Raises:
            ValueError: neither or both of `input_ids` and `inputs_embeds`; on the CPU, a text without any token or padded on the left.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        words = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds  # [B, L, embedding_size]
        if attention_mask is None:
            lengths = torch.full((len(words),), words.shape[1], device=words.device)
        else:
            lengths = attention_mask.sum(dim=1)
            refuse_empty(lengths)
            refuse_padding_before(lengths - 1, attention_mask)
        return BaseModelOutput(last_hidden_state=self.gru(words, lengths))


class VlpVseRegionMlp(nn.Module):
    """The MLP beside the projection of region features."""

    def __init__(self, config: VlpVseConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.region_size, config.region_mlp_size)
        self.norm = MaskedBatchNorm(config.region_mlp_size)
        self.fc2 = nn.Linear(config.region_mlp_size, config.projection_dim)
        self.all_rows = config.region_norm_rows == "all"

    def forward(self, features: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """`features` [B, R, F], `mask` [B, R] -> [B, R, E]."""
        hidden = self.norm(self.fc1(features), None if self.all_rows else mask)
        return self.fc2(nn.functional.relu(hidden))


def as_cells(states: torch.Tensor) -> torch.Tensor:
    """Maps [B, D, h, w] -> [B, h * w, D] in raster order; tokens of a transformer [B, P, D] as they are."""
    return states.flatten(2).transpose(1, 2) if states.ndim == 4 else states


class VlpVseModel(VlpVsePreTrainedModel):
    """Both sides, their projections and their pooling."""

    def __init__(self, config: VlpVseConfig):
        super().__init__(config)
        self.text_model = build_tower(config.text_config, pooler=False)
        if isinstance(self.text_model, VlpVseGruModel):
            self.text_projection = nn.Identity()
        else:
            self.text_projection = nn.Linear(tower_width(self.text_model), config.projection_dim)
        self.text_pooling = GeneralizedPooling(config.position_size, config.pooling_size)
        if config.vision_config is None:
            self.vision_model, width = None, config.region_size
            self.region_mlp = VlpVseRegionMlp(config)
        else:
            self.vision_model = build_tower(config.vision_config, pooler=False)
            width = tower_width(self.vision_model)
        self.visual_projection = nn.Linear(width, config.projection_dim)
        self.visual_pooling = GeneralizedPooling(config.position_size, config.pooling_size)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, VlpVseModel):
            bound = (6 / (module.visual_projection.in_features + module.visual_projection.out_features)) ** 0.5
            init.uniform_(module.visual_projection.weight, -bound, bound)
            init.zeros_(module.visual_projection.bias)

    def train(self, mode: bool = True) -> "VlpVseModel":
        """As in torch; batch norms of the CNN stay in evaluation mode, unless a `VlpVseGridConfig` says otherwise."""
        super().train(mode)
        if self.vision_model is not None and getattr(self.config.vision_config, "freeze_norms", True):
            keep_statistics(self.vision_model)
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.text_model.set_input_embeddings(value)

    def fill_tower(self, name: str, tower: str | PreTrainedModel) -> None:
        """Give `text_model` or `vision_model` pretrained weights: of a folder, a Hub id or a model.

        Raises:
            ValueError: no such tower, or the weights are not those of its class; a pooling layer left unused is allowed.
        """
        fill_tower(self, name, tower)

    def freeze_stages(self, stages: int) -> None:
        """Cut the stem and the first `stages` stages of the CNN from training, and let the rest train: 0 for none, 4 for all of a ResNet.

        The original's `fixed_blocks`. A tower without stages named layer1, layer2, ... is frozen whole or not at all.

        Raises:
            ValueError: a region model, or more stages than there are.
        """
        if self.vision_model is None:
            raise ValueError("freeze_stages needs a model that sees pixels: this one has no CNN, its regions are given")
        found = {name: STAGE.search(name) for name, _ in self.vision_model.named_parameters()}
        last = max((int(match[1]) for match in found.values() if match), default=0)
        if not 0 <= stages <= max(last, 1):
            raise ValueError(f"freeze_stages({stages}): the tower has {max(last, 1)} stage(s)")
        for name, parameter in self.vision_model.named_parameters():
            stage = int(found[name][1]) if found[name] else 0
            parameter.requires_grad_(stages == 0 or stage > stages)

    def count_cells(self, height: int, width: int) -> int:
        """Grid cells P of a picture of `height` x `width` pixels, by trying it out.

        Raises:
            ValueError: a region model.
        """
        if self.vision_model is None:
            raise ValueError("count_cells needs a model that sees pixels: this one is given regions")
        pixels = torch.zeros(1, 3, height, width, device=self.device, dtype=self.dtype)
        modes = [(module, module.training) for module in self.vision_model.modules()]
        self.vision_model.eval()  # norms that train would take this picture into their statistics
        with torch.no_grad():
            cells = as_cells(self.vision_model(pixels).last_hidden_state).shape[1]
        for module, training in modes:
            module.training = training
        return cells

    def encode_image(
        self,
        pixel_values: torch.Tensor | None = None,
        region_features: torch.Tensor | None = None,
        region_mask: torch.Tensor | None = None,
        grid_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Pooled embeddings [B, E], not normalised.

        Args:
            pixel_values: [B, 3, H, W], for a model with an image tower. grid_mask: [B, P], 1 at cells to keep (None: all); the
                size augmentation of the grid.
            region_features: [B, R, F], for a model of regions. region_mask: [B, R], 1 at real regions (None: all).

        Raises:
            ValueError: not the input this model takes, another width, a mask of another shape; on the CPU, an image without any region
                or cell.
        """
        if self.vision_model is None:
            if pixel_values is not None:
                raise ValueError("this model sees regions: give region_features alone (pixels need a model with a vision_config)")
            return self.encode_regions(region_features, region_mask)
        if pixel_values is None or region_features is not None:
            raise ValueError("this model sees pixels: give pixel_values alone (regions need a model whose vision_config is None)")
        return self.pool_cells(self.vision_model(pixel_values), grid_mask)

    def pool_cells(self, outputs: BaseModelOutput, grid_mask: torch.Tensor | None) -> torch.Tensor:
        """Embeddings [B, E] of an image tower's outputs, not normalised."""
        return self.visual_pooling(self.visual_projection(as_cells(outputs.last_hidden_state)), grid_mask)[0]

    def encode_regions(self, region_features: torch.Tensor | None, region_mask: torch.Tensor | None) -> torch.Tensor:
        """See `encode_image`."""
        if region_features is None:
            raise ValueError("this model sees regions: give region_features (pixels need a model with a vision_config)")
        if region_features.ndim != 3 or region_features.shape[2] != self.config.region_size:
            raise ValueError(
                f"region_features must be [B, R, {self.config.region_size}] for this model, got {tuple(region_features.shape)}"
            )
        if region_mask is not None and region_mask.shape != region_features.shape[:2]:
            raise ValueError(
                f"region_mask must be {list(region_features.shape[:2])} as region_features are, got {list(region_mask.shape)}"
            )
        projected = self.visual_projection(region_features) + self.region_mlp(region_features, region_mask)
        return self.visual_pooling(projected, region_mask)[0]

    def encode_text(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """`input_ids`, `attention_mask` [B, L] -> pooled embeddings [B, E], not normalised.

        Raises:
            ValueError: on the CPU, a text without any token.
        """
        if isinstance(self.text_model, VlpVseGruModel):  # computes no padding by itself
            states = self.text_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        else:
            seen = self.attended(input_ids, attention_mask)
            states = token_states(self.text_model, input_ids, attention_mask, seen)
        return self.pool_words(states, attention_mask)

    def attended(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
        """Mask [B, L] of what the text tower attends to."""
        padding = self.config.text_config.pad_token_id
        if self.config.text_config.model_type != "bert" or padding is None:
            return attention_mask
        # a word that caption augmentation replaced by padding is pooled but not attended to, as in the original
        kept = (input_ids != padding).to(input_ids.dtype)
        return kept if attention_mask is None else attention_mask * kept

    def pool_words(self, states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """Embeddings [B, E] of the text tower's token states [B, L, D], not normalised."""
        return self.text_pooling(self.text_projection(states), attention_mask)[0]

    def get_image_features(
        self,
        pixel_values: torch.Tensor | None = None,
        region_features: torch.Tensor | None = None,
        region_mask: torch.Tensor | None = None,
        grid_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embeddings [B, E], of unit length unless `normalize_image` is off; arguments and errors of `encode_image`."""
        return self.finished_image(self.encode_image(pixel_values, region_features, region_mask, grid_mask))

    def get_text_features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """`input_ids`, `attention_mask` [B, L] -> embeddings [B, E], of unit length unless `normalize_text` is off."""
        return self.finished_text(self.encode_text(input_ids, attention_mask))

    def finished_image(self, embeds: torch.Tensor) -> torch.Tensor:
        """Raw embeddings of images [B, E], normalised where the configuration says so."""
        return unit_rows(embeds, NORM_EPS) if self.config.normalize_image else embeds

    def finished_text(self, embeds: torch.Tensor) -> torch.Tensor:
        """Raw embeddings of texts [B, E], normalised where the configuration says so."""
        return unit_rows(embeds, NORM_EPS) if self.config.normalize_text else embeds

    def score_pairs(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **image: torch.Tensor
    ) -> torch.Tensor:
        """Inner product of each text with the image of the same row, [B]; higher is a better match.

        `image`: what `get_image_features` takes.
        """
        require_pairs(input_ids=input_ids, **image)
        return (self.get_text_features(input_ids, attention_mask) * self.get_image_features(**image)).sum(dim=-1)

    @merge_with_config_defaults
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        region_features: torch.Tensor | None = None,
        region_mask: torch.Tensor | None = None,
        grid_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> DualEncoderOutput:
        """Every caption against every image.

        `input_ids`, `attention_mask` [C, L]; images as in `encode_image`. Returns scores, the inner products, [B, C] and [C, B], the
        embeddings and the towers' outputs.

        Raises:
            ValueError: if one side is missing; the one-sided verbs are `get_image_features` and `get_text_features`.
        """
        if input_ids is None or (pixel_values is None and region_features is None):
            raise ValueError(
                "VSE-infinity's forward needs input_ids and pixel_values or region_features; for one side call get_text_features "
                "or get_image_features"
            )
        if self.vision_model is None or pixel_values is None or region_features is not None:
            vision, image_embeds = None, self.encode_image(pixel_values, region_features, region_mask, grid_mask)
        else:
            vision = self.vision_model(pixel_values, return_dict=True, **kwargs)
            image_embeds = self.pool_cells(vision, grid_mask)
        seen = self.attended(input_ids, attention_mask)
        text = self.text_model(input_ids=input_ids, attention_mask=seen, return_dict=True, **kwargs)
        image_embeds = self.finished_image(image_embeds)
        text_embeds = self.finished_text(self.pool_words(text.last_hidden_state, attention_mask))
        per_image = image_embeds @ text_embeds.T
        return DualEncoderOutput(per_image, per_image.T, text_embeds, image_embeds, text, vision)


class VlpVseForPreTraining(VlpVsePreTrainedModel):
    """Training with the hinge ranking loss of VSE++ (https://arxiv.org/abs/1707.05612), the only objective of this architecture.

    On N processes with `negatives="global"` every caption meets N * B - 1 other images; gradients reach all of them.
    """

    def __init__(self, config: VlpVseConfig):
        super().__init__(config)
        self.vse = VlpVseModel(config)
        self.hardest_negatives = config.hardest_negatives  # where the training stands; the configuration says where it begins
        self.post_init()

    def get_image_features(self, *args, **kwargs) -> torch.Tensor:
        """See `VlpVseModel.get_image_features`."""
        return self.vse.get_image_features(*args, **kwargs)

    def get_text_features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """See `VlpVseModel.get_text_features`."""
        return self.vse.get_text_features(input_ids, attention_mask)

    def score_pairs(self, *args, **kwargs) -> torch.Tensor:
        """See `VlpVseModel.score_pairs`."""
        return self.vse.score_pairs(*args, **kwargs)

    def freeze_stages(self, stages: int) -> None:
        """See `VlpVseModel.freeze_stages`."""
        self.vse.freeze_stages(stages)

    def count_cells(self, height: int, width: int) -> int:
        """See `VlpVseModel.count_cells`."""
        return self.vse.count_cells(height, width)

    def ramps(self) -> dict[str, Callable[[float], None]]:
        """What a recipe's `ramps` may change while training: the form of the loss, and how many stages of a CNN are frozen."""

        def hardest_negatives(share: float) -> None:
            if not 0 <= share <= 1:
                raise ValueError(f"{share} is no share of the hardest-negatives form: give 0 to 1")
            self.hardest_negatives = share

        frozen = {} if self.vse.vision_model is None else {"frozen_stages": lambda stages: self.freeze_stages(int(stages))}
        return {"hardest_negatives": hardest_negatives, **frozen}

    def collapsed_loss(self, pairs: int) -> float:
        """The loss of a batch of `pairs` pairs over all processes once all embeddings are the same: a training that stays there has
        collapsed."""
        pairs = pairs if self.config.negatives == "global" else pairs // world_size()
        return collapsed_loss(pairs, margin=self.config.margin, hardest=self.hardest_negatives)

    def embed(self, input_ids, attention_mask=None, **image) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings of the images and of the texts, [B, E] each."""
        return self.vse.get_image_features(**image), self.vse.get_text_features(input_ids, attention_mask)

    def objective(
        self, image_embeds: torch.Tensor, text_embeds: torch.Tensor, image_ids: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss and its named terms for embeddings [B, E] of this process."""
        if self.config.contrastive_targets == "plain":
            image_ids = None
        batch = {"image_ids": image_ids}
        if self.config.negatives == "global" and world_size() > 1:
            batch["all_image_embeds"] = gather_with_gradient(image_embeds)
            batch["all_text_embeds"] = gather_with_gradient(text_embeds)
            batch["all_image_ids"] = None if image_ids is None else gather_without_gradient(image_ids)
            batch["offset"] = rank() * len(image_embeds)
        form = {"margin": self.config.margin, "hardest": self.hardest_negatives}
        loss = triplet_loss(image_embeds, text_embeds, **form, **batch)
        return loss, {"triplet": loss}

    @merge_with_config_defaults
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        region_features: torch.Tensor | None = None,
        region_mask: torch.Tensor | None = None,
        grid_mask: torch.Tensor | None = None,
        image_ids: torch.Tensor | None = None,
    ) -> PreTrainingOutput:
        """`input_ids`, `attention_mask` [B, L], images as in `VlpVseModel.encode_image`, `image_ids` [B] -> loss, losses["triplet"] and
        embeddings [B, E].

        Raises:
            ValueError: if one side is missing, or the two sides differ in number.
        """
        image = pixel_values if pixel_values is not None else region_features
        if input_ids is None or image is None:
            raise ValueError("training needs input_ids and pixel_values or region_features")
        require_pairs(input_ids=input_ids, images=image, image_ids=image_ids)
        image_embeds = self.vse.get_image_features(pixel_values, region_features, region_mask, grid_mask)
        text_embeds = self.vse.get_text_features(input_ids, attention_mask)
        loss, losses = self.objective(image_embeds, text_embeds, image_ids)
        return PreTrainingOutput(loss, losses, image_embeds, text_embeds)
