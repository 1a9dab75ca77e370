"""CLIP: two towers trained to agree on which caption belongs to which picture.

Paper: "Learning Transferable Visual Models From Natural Language Supervision", https://arxiv.org/abs/2103.00020, section 2.

Differences from the released code:
1. End-of-text is the first `eos_token_id` of a row, and a row without one is an error; the original takes the row's largest id,
   which breaks with added tokens (`pooling="largest_id"` in the text configuration restores it).
2. Texts of any length up to the position table; the original demands exactly its length. Exact, because attention is causal.
3. Images of any size: position tables are interpolated; the original accepts one size.
4. Float32 checkpoints are loaded as they are; the original rounds them through half precision (the converter can do that too).
5. Attention projections are separate linear layers instead of one fused tensor; the numbers are the same.
6. `get_image_features` and `get_text_features` return unit vectors, the original's `encode_*` raw ones: ours of that name do too.
7. There is training: the loss of the paper, which the released code lacks. With `image_ids` in the batch, captions of one image are
   all positives (`contrastive_targets="plain"` restores the paper's targets).
8. In training and for features, the last block runs only for the pooled row. Exact.
"""

import torch
from torch import nn
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import AutoModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from hf_vlp.distributed import gather_with_gradient, gather_without_gradient, rank, world_size
from hf_vlp.layers.attention import AttendsInAnyWay, Attention
from hf_vlp.layers.blocks import Block
from hf_vlp.layers.encoder import Encoder
from hf_vlp.layers.initialization import InitializesEveryModule, multihead_default_, torch_default_
from hf_vlp.layers.logit_scale import LogitBias, LogitScale
from hf_vlp.layers.patch_embedding import PatchEmbedding, resize_position_table
from hf_vlp.layers.pooling import (
    first_token_index,
    gather_rows,
    largest_id_index,
    masked_mean,
    refuse_padding_before,
    unit_rows,
)
from hf_vlp.layers.resnet import OUTPUT_STRIDE, AttentionPool, Bottleneck, ModifiedResNet
from hf_vlp.layers.towers import LoadsOutOfAPair, build_tower, fill_tower, require_pairs, tower_width
from hf_vlp.models.clip.configuration_clip import (
    VlpClipConfig,
    VlpClipResNetConfig,
    VlpClipTextConfig,
    VlpClipVisionConfig,
)
from hf_vlp.objectives.contrastive import contrastive_loss
from hf_vlp.objectives.sigmoid import sigmoid_loss
from hf_vlp.outputs import DualEncoderOutput, PreTrainingOutput


def transformer(config: VlpClipTextConfig | VlpClipVisionConfig, is_causal: bool = False) -> Encoder:
    """The blocks of a text or vision transformer."""
    return Encoder(
        Block(
            config,
            config.hidden_size,
            config.intermediate_size,
            config.num_attention_heads,
            hidden_act=config.hidden_act,
            norm_eps=config.layer_norm_eps,
            dropout=config.attention_dropout,
            is_causal=is_causal,
        )
        for _ in range(config.num_hidden_layers)
    )


class VlpClipTextEmbeddings(nn.Module):
    """Token embedding plus a learned position table."""

    def __init__(self, config: VlpClipTextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Parameter(torch.empty(config.max_position_embeddings, config.hidden_size))

    def forward(self, input_ids: torch.Tensor | None = None, inputs_embeds: torch.Tensor | None = None) -> torch.Tensor:
        """`input_ids` [B, L], or their embeddings [B, L, D] -> [B, L, D].

        Raises:
            ValueError: for a text longer than the table, or without either input.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        tokens = self.token_embedding(input_ids) if inputs_embeds is None else inputs_embeds
        length, longest = tokens.shape[1], self.position_embedding.shape[0]
        if length > longest:
            raise ValueError(
                f"texts of {length} tokens, but the position table has {longest} rows: truncate (the processor does) or lengthen "
                "the table with resize_position_embeddings, which needs training"
            )
        return tokens + self.position_embedding[:length].to(tokens.dtype)


class VlpClipVisionEmbeddings(nn.Module):
    """Patches behind a class token, plus a learned position table that is interpolated to the image's grid."""

    def __init__(self, config: VlpClipVisionConfig):
        super().__init__()
        grid = config.image_size // config.patch_size
        self.class_embedding = nn.Parameter(torch.empty(config.hidden_size))
        self.patch_embedding = PatchEmbedding(config.num_channels, config.hidden_size, config.patch_size, bias=False)
        self.position_embedding = nn.Parameter(torch.empty(1 + grid * grid, config.hidden_size))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`pixel_values` [B, 3, H, W] -> [B, 1 + P, D]."""
        patches = self.patch_embedding(pixel_values)  # [B, D, h, w]
        positions = resize_position_table(self.position_embedding, patches.shape[-2:]).to(patches.dtype)
        tokens = patches.flatten(2).transpose(1, 2)  # [B, P, D]
        classes = self.class_embedding.to(tokens.dtype).expand(len(tokens), 1, -1)
        return torch.cat([classes, tokens], dim=1) + positions


class VlpClipPreTrainedModel(InitializesEveryModule, AttendsInAnyWay, PreTrainedModel):
    """Initialisation and capabilities of every CLIP class."""

    config: VlpClipConfig
    base_model_prefix = "clip"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _no_split_modules = ["Block", "Bottleneck", "VlpClipTextEmbeddings", "VlpClipVisionEmbeddings"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """Classifier heads as transformers does; the towers and the pair have their own rules below."""
        super()._init_weights(module)
        if isinstance(module, (LogitScale, LogitBias)):
            module.reset_parameters()


class VlpClipTower(LoadsOutOfAPair, VlpClipPreTrainedModel):
    """One tower alone: it also loads its part out of a folder that holds the whole model."""

    pair_prefix = "clip"
    pair_parts = ("text_model", "vision_model", "text_projection", "visual_projection", "logit_scale", "logit_bias", "classifier")


class VlpClipTextModel(VlpClipTower):
    """The causal text transformer (section 2.4)."""

    config: VlpClipTextConfig
    base_model_prefix = "text_model"
    main_input_name = "input_ids"
    input_modalities = ("text",)
    _can_record_outputs = {"hidden_states": Block, "attentions": Attention}

    def __init__(self, config: VlpClipTextConfig):
        super().__init__(config)
        self.embeddings = VlpClipTextEmbeddings(config)
        self.encoder = transformer(config, is_causal=True)
        self.final_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """The released code's `initialize_parameters` for the text side."""
        super()._init_weights(module)
        width = self.config.hidden_size
        residual = width**-0.5 * (2 * self.config.num_hidden_layers) ** -0.5
        if isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=0.02)
        elif isinstance(module, VlpClipTextEmbeddings):
            init.normal_(module.position_embedding, std=0.01)
        elif isinstance(module, nn.Linear):
            torch_default_(module)
        elif isinstance(module, Attention):
            for projection in (module.q_proj, module.k_proj, module.v_proj):
                init.normal_(projection.weight, std=width**-0.5)
                init.zeros_(projection.bias)
            init.normal_(module.out_proj.weight, std=residual)
            init.zeros_(module.out_proj.bias)
        elif isinstance(module, Block):
            init.normal_(module.mlp.fc1.weight, std=(2 * width) ** -0.5)
            init.normal_(module.mlp.fc2.weight, std=residual)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings.token_embedding

    def set_input_embeddings(self, value: nn.Embedding):
        self.embeddings.token_embedding = value

    def get_position_embeddings(self) -> nn.Parameter:
        return self.embeddings.position_embedding

    @torch.no_grad()
    def resize_position_embeddings(self, new_num_position_embeddings: int) -> None:
        """Shorten or lengthen the position table; new rows are drawn as at initialisation and need training."""
        old = self.embeddings.position_embedding
        new = torch.empty(new_num_position_embeddings, old.shape[1], dtype=old.dtype, device=old.device).normal_(std=0.01)
        kept = min(len(old), len(new))
        new[:kept] = old[:kept]
        self.embeddings.position_embedding = nn.Parameter(new)
        self.config.max_position_embeddings = new_num_position_embeddings

    def end_of_text(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Position of the pooled token in each row of `input_ids` [B, L] -> [B]; see `pooling` in the configuration.

        Raises:
            ValueError: a row without end-of-text; on the CPU also one that `attention_mask` [B, L] says is padded on the left.
        """
        if self.config.pooling == "largest_id":
            end = largest_id_index(input_ids)
        else:
            end = first_token_index(input_ids, self.config.eos_token_id)
        if attention_mask is not None:
            refuse_padding_before(end, attention_mask)
        return end

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Every token state and the pooled one.

        `input_ids` [B, L] end with end-of-text and are padded on the right. `attention_mask` [B, L] is not needed, because causal
        attention never looks at what comes later; on the CPU it is searched for padding on the left, which is an error.
        `inputs_embeds` [B, L, D] replace the token embeddings; `input_ids` may then be given too, to find the end of text, else the
        last position is pooled.

        Returns `last_hidden_state` [B, L, D] after the final norm and `pooler_output` [B, D], its row at the end of text.
        """
        hidden_states = self.embeddings(None if inputs_embeds is not None else input_ids, inputs_embeds)
        mask = create_causal_mask(self.config, hidden_states, None, None)
        hidden_states = self.final_norm(self.encoder(hidden_states, mask, **kwargs))
        if input_ids is None:
            pooled = hidden_states[:, -1]
        else:
            pooled = gather_rows(hidden_states, self.end_of_text(input_ids, attention_mask))
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=pooled)

    def pooled_output(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """`forward(...).pooler_output` [B, D], with the last block computed for the pooled row alone."""
        end = self.end_of_text(input_ids, attention_mask)
        hidden_states = self.embeddings(input_ids)
        mask = create_causal_mask(self.config, hidden_states, None, None)
        seen = torch.arange(input_ids.shape[1], device=end.device)[None, :] <= end[:, None]  # [B, L]
        row_mask = create_bidirectional_mask(
            self.config, inputs_embeds=hidden_states[:, :1], attention_mask=seen.long(), encoder_hidden_states=hidden_states
        )
        return self.final_norm(self.encoder.pooled_row(hidden_states, mask, end, row_mask))


class VlpClipImageTower(VlpClipTower):
    """What both image towers share: a position table for one square grid, which can be made for another."""

    def image_positions(self) -> tuple[nn.Module, int]:
        """The module that holds `position_embedding`, and the pixels of one cell of its grid."""
        raise AttributeError(f"{type(self).__name__} names no position table")

    @torch.no_grad()
    def resize_image_positions(self, image_size: int) -> None:
        """Interpolate the stored table for images of `image_size` pixels, to go on training at that resolution.

        Only needed to train on: a forward interpolates by itself where the image's grid is another.

        Raises:
            ValueError: if `image_size` is smaller than one cell.
        """
        holder, cell = self.image_positions()
        if image_size < cell:
            raise ValueError(f"image_size {image_size} is smaller than one cell of {cell} pixels")
        grid = image_size // cell
        holder.position_embedding = nn.Parameter(resize_position_table(holder.position_embedding, (grid, grid)).clone())
        self.config.image_size = image_size


class VlpClipVisionModel(VlpClipImageTower):
    """The vision transformer (section 2.4)."""

    config: VlpClipVisionConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _can_record_outputs = {"hidden_states": Block, "attentions": Attention}

    def __init__(self, config: VlpClipVisionConfig):
        super().__init__(config)
        self.embeddings = VlpClipVisionEmbeddings(config)
        self.pre_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = transformer(config)
        self.post_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """The released code leaves the vision blocks at torch's defaults and draws the tables with std D^-0.5."""
        super()._init_weights(module)
        if isinstance(module, VlpClipVisionEmbeddings):
            init.normal_(module.class_embedding, std=self.config.hidden_size**-0.5)
            init.normal_(module.position_embedding, std=self.config.hidden_size**-0.5)
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            torch_default_(module)
        elif isinstance(module, Attention):
            multihead_default_(module)

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.patch_embedding

    def image_positions(self) -> tuple[nn.Module, int]:
        return self.embeddings, self.config.patch_size

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> BaseModelOutputWithPooling:
        """`pixel_values` [B, 3, H, W] -> `last_hidden_state` [B, 1 + P, D] before, `pooler_output` [B, D] after the last norm."""
        hidden_states = self.encoder(self.pre_norm(self.embeddings(pixel_values)), None, **kwargs)
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden_states, pooler_output=self.post_norm(hidden_states[:, 0])
        )

    def pooled_output(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`forward(...).pooler_output` [B, D], with the last block computed for the class token alone."""
        hidden_states = self.pre_norm(self.embeddings(pixel_values))
        first = torch.zeros(len(hidden_states), dtype=torch.long, device=hidden_states.device)
        return self.post_norm(self.encoder.pooled_row(hidden_states, None, first))


class VlpClipResNetModel(VlpClipImageTower):
    """The modified ResNet with attention pooling (section 2.4)."""

    config: VlpClipResNetConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _can_record_outputs = {"hidden_states": Bottleneck, "attentions": Attention}

    def __init__(self, config: VlpClipResNetConfig):
        super().__init__(config)
        self.resnet = ModifiedResNet(config.layers, config.width, config.num_channels)
        self.attention_pool = AttentionPool(
            config, config.image_size // OUTPUT_STRIDE, config.hidden_size, config.num_attention_heads, config.projection_dim
        )
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """The released code: attention pool with std D^-0.5, the last norm of every bottleneck zero, torch's defaults elsewhere."""
        super()._init_weights(module)
        std = self.config.hidden_size**-0.5
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            torch_default_(module)
        elif isinstance(module, Bottleneck):
            init.zeros_(module.bn3.weight)
        elif isinstance(module, AttentionPool):
            init.normal_(module.position_embedding, std=std)
            attention = module.attention
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj):
                init.normal_(projection.weight, std=std)

    def get_input_embeddings(self) -> nn.Module:
        return self.resnet.conv1

    def image_positions(self) -> tuple[nn.Module, int]:
        return self.attention_pool, OUTPUT_STRIDE

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> BaseModelOutputWithPooling:
        """`pixel_values` [B, 3, H, W] -> `last_hidden_state` [B, D, H / 32, W / 32] and `pooler_output` [B, E].

        The attention pool ends with the projection into the joint space, so the pooled output is the image's raw embedding.

        Raises:
            ValueError: for an image smaller than the output stride or with another number of channels.
        """
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.config.num_channels or min(pixel_values.shape[-2:]) < OUTPUT_STRIDE:
            raise ValueError(
                f"pixel_values must be [B, {self.config.num_channels}, H, W] with H and W of 32 or more, "
                f"got shape {tuple(pixel_values.shape)}"
            )
        features = self.resnet(pixel_values)
        return BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=self.attention_pool(features, **kwargs))

    def pooled_output(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`forward(...).pooler_output` [B, E]."""
        return self(pixel_values).pooler_output


def build_image_side(config: VlpClipConfig) -> tuple[PreTrainedModel, nn.Module]:
    """The image tower and its projection into the joint space; a modified ResNet projects inside its attention pool."""
    tower = build_tower(config.vision_config, pooler=True)
    if isinstance(tower, VlpClipResNetModel):
        return tower, nn.Identity()
    return tower, nn.Linear(tower_width(tower), config.projection_dim, bias=False)


class VlpClipModel(VlpClipPreTrainedModel):
    """Two towers, their projections into the joint space, and the scale of their similarities."""

    def __init__(self, config: VlpClipConfig):
        super().__init__(config)
        self.text_model = build_tower(config.text_config, pooler=config.foreign_text_pooling == "pooler")
        self.text_projection = nn.Linear(tower_width(self.text_model), config.projection_dim, bias=False)
        self.vision_model, self.visual_projection = build_image_side(config)
        self.logit_scale = LogitScale(config.logit_scale_init_value, config.logit_scale_max)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """The released code: projections with std D^-0.5 of their input."""
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=module.in_features**-0.5)

    @classmethod
    def from_towers(cls, vision: str | PreTrainedModel, text: str | PreTrainedModel, **config) -> "VlpClipModel":
        """A pair from two pretrained towers: folders, Hub ids or models; only the projections and the scale are new.

        `config`: further fields of `VlpClipConfig`. Freeze a tower with `requires_grad_(False)` or by a recipe's pattern.

        Raises:
            ValueError: a tower's weights are not those of its configuration's model; a pooling layer left unused is allowed.
        """
        towers = {
            name: AutoModel.from_pretrained(tower) if isinstance(tower, str) else tower
            for name, tower in (("vision_model", vision), ("text_model", text))
        }
        model = cls(VlpClipConfig(vision_config=towers["vision_model"].config, text_config=towers["text_model"].config, **config))
        for name, tower in towers.items():
            fill_tower(model, name, tower)
        return model

    def fill_tower(self, name: str, tower: str | PreTrainedModel) -> None:
        """Give `text_model` or `vision_model` pretrained weights: of a folder, a Hub id or a model.

        Raises:
            ValueError: no such tower, or the weights are not those of its class; a pooling layer left unused is allowed.
        """
        fill_tower(self, name, tower)

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.text_model.set_input_embeddings(value)

    def resize_position_embeddings(self, new_num_position_embeddings: int) -> None:
        """Shorten or lengthen the text tower's position table; new rows need training."""
        self.text_model.resize_position_embeddings(new_num_position_embeddings)

    def resize_image_positions(self, image_size: int) -> None:
        """Interpolate the image tower's position table for images of `image_size` pixels; see the tower's method."""
        self.vision_model.resize_image_positions(image_size)

    def pool_text(self, outputs, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """The pooled state [B, D] of a text tower's outputs."""
        if isinstance(self.text_model, VlpClipTextModel) or self.config.foreign_text_pooling == "pooler":
            return outputs.pooler_output
        if self.config.foreign_text_pooling == "first":
            return outputs.last_hidden_state[:, 0]
        return masked_mean(outputs.last_hidden_state, attention_mask)

    @staticmethod
    def pool_image(outputs) -> torch.Tensor:
        """The pooled state [B, D] of an image tower's outputs: its own, else the mean over its tokens."""
        pooled = getattr(outputs, "pooler_output", None)
        return outputs.last_hidden_state.mean(dim=1) if pooled is None else pooled.flatten(1)

    def encode_image(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`pixel_values` [B, 3, H, W] -> raw embeddings [B, E], not normalised (the original's `encode_image`)."""
        if hasattr(self.vision_model, "pooled_output"):
            return self.visual_projection(self.vision_model.pooled_output(pixel_values))
        return self.visual_projection(self.pool_image(self.vision_model(pixel_values)))

    def encode_text(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """`input_ids` [B, L] -> raw embeddings [B, E], not normalised (the original's `encode_text`)."""
        if isinstance(self.text_model, VlpClipTextModel):
            return self.text_projection(self.text_model.pooled_output(input_ids, attention_mask))
        outputs = self.text_model(input_ids=input_ids, attention_mask=attention_mask)
        return self.text_projection(self.pool_text(outputs, attention_mask))

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`pixel_values` [B, 3, H, W] -> unit vectors [B, E]."""
        return unit_rows(self.encode_image(pixel_values))

    def get_text_features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """`input_ids` [B, L] -> unit vectors [B, E]."""
        return unit_rows(self.encode_text(input_ids, attention_mask))

    def score_pairs(
        self, input_ids: torch.Tensor, pixel_values: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Cosine of each text with the image of the same row, [B]; higher is a better match, 0.2 to 0.35 is usual for a true pair."""
        require_pairs(input_ids=input_ids, pixel_values=pixel_values)
        return (self.get_text_features(input_ids, attention_mask) * self.get_image_features(pixel_values)).sum(dim=-1)

    @merge_with_config_defaults
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> DualEncoderOutput:
        """Every caption against every image.

        `input_ids`, `attention_mask` [C, L]; `pixel_values` [B, 3, H, W]. Returns logits exp(t) * cosine, [B, C] and [C, B], the unit
        embeddings and the towers' outputs.

        Raises:
            ValueError: if one side is missing; the one-sided verbs are `get_image_features` and `get_text_features`.
        """
        if input_ids is None or pixel_values is None:
            raise ValueError("CLIP's forward needs input_ids and pixel_values; for one side call get_text_features or get_image_features")
        vision = self.vision_model(pixel_values, return_dict=True, **kwargs)
        text = self.text_model(input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **kwargs)
        image_embeds = unit_rows(self.visual_projection(self.pool_image(vision)))
        text_embeds = unit_rows(self.text_projection(self.pool_text(text, attention_mask)))
        per_image = self.logit_scale().to(image_embeds.dtype) * image_embeds @ text_embeds.T
        return DualEncoderOutput(per_image, per_image.T, text_embeds, image_embeds, text, vision)


class VlpClipForPreTraining(VlpClipPreTrainedModel):
    """Contrastive pre-training (section 2.3, figure 3).

    On N processes with `negatives="global"` every caption meets N * B - 1 other images; gradients reach all of them.
    """

    def __init__(self, config: VlpClipConfig):
        super().__init__(config)
        self.clip = VlpClipModel(config)
        if config.contrastive_loss == "sigmoid":
            self.logit_bias = LogitBias(config.logit_bias_init_value)
        self.post_init()

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """See `VlpClipModel.get_image_features`."""
        return self.clip.get_image_features(pixel_values)

    def get_text_features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """See `VlpClipModel.get_text_features`."""
        return self.clip.get_text_features(input_ids, attention_mask)

    def score_pairs(self, input_ids, pixel_values, attention_mask=None) -> torch.Tensor:
        """See `VlpClipModel.score_pairs`."""
        return self.clip.score_pairs(input_ids, pixel_values, attention_mask)

    def resize_image_positions(self, image_size: int) -> None:
        """See `VlpClipModel.resize_image_positions`."""
        self.clip.resize_image_positions(image_size)

    def after_step(self) -> None:
        """To be called after every optimizer step: limits the scale (section 2.5)."""
        self.clip.logit_scale.clamp_()

    def embed(self, input_ids, pixel_values, attention_mask=None) -> tuple[torch.Tensor, torch.Tensor]:
        """Unit embeddings of the images and of the texts, [B, E] each."""
        return self.clip.get_image_features(pixel_values), self.clip.get_text_features(input_ids, attention_mask)

    def objective(
        self, image_embeds: torch.Tensor, text_embeds: torch.Tensor, image_ids: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss and its named terms for unit embeddings [B, E] of this process."""
        if self.config.contrastive_targets == "plain":
            image_ids = None
        batch = {"image_ids": image_ids}
        if self.config.negatives == "global" and world_size() > 1:
            batch["all_image_embeds"] = gather_with_gradient(image_embeds)
            batch["all_text_embeds"] = gather_with_gradient(text_embeds)
            batch["all_image_ids"] = None if image_ids is None else gather_without_gradient(image_ids)
            batch["offset"] = rank() * len(image_embeds)
        scale = self.clip.logit_scale()
        if self.config.contrastive_loss == "sigmoid":
            loss = sigmoid_loss(image_embeds, text_embeds, scale, bias=self.logit_bias(), **batch)
        else:
            loss = contrastive_loss(image_embeds, text_embeds, scale, **batch)
        return loss, {"itc": loss}

    @merge_with_config_defaults
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_ids: torch.Tensor | None = None,
    ) -> PreTrainingOutput:
        """`input_ids`, `attention_mask` [B, L], `pixel_values` [B, 3, H, W], `image_ids` [B] -> loss, losses["itc"] and embeddings [B, E].

        Raises:
            ValueError: if one side is missing, or the two sides differ in number.
        """
        if input_ids is None or pixel_values is None:
            raise ValueError("contrastive pre-training needs input_ids and pixel_values")
        require_pairs(input_ids=input_ids, pixel_values=pixel_values, image_ids=image_ids)
        image_embeds, text_embeds = self.embed(input_ids, pixel_values, attention_mask)
        loss, losses = self.objective(image_embeds, text_embeds, image_ids)
        return PreTrainingOutput(loss, losses, image_embeds, text_embeds)
