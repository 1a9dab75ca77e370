"""ALBEF: image and text are aligned by contrast before a third encoder fuses them, and a momentum copy of the model teaches it.

Paper: "Align before Fuse: Vision and Language Representation Learning with Momentum Distillation", https://arxiv.org/abs/2107.07651.

Differences from the released code:
1. BERT's halves are two modules, the text encoder and the fusion layers; the numbers are the same. The text encoder may be any other of
   transformers.
2. With `image_ids` in the batch, texts of one image are all its own in contrast and never false in matching, in pre-training too
   (`contrastive_targets="plain"` restores the paper's targets in pre-training, "exclude" leaves the others out of the sum).
3. A batch whose texts are all of one image has no false pairs and teaches matching by its true ones; the original stops with an error, also
   where softmax leaves nothing beside the true pair.
4. A batch without a masked word has a loss of 0 for that term; the original's is not a number.
5. The queue takes batches of any size; the original needs its length to be a multiple of the batch.
6. The momentum copy moves once an optimizer step where the loop says when one begins (`before_step`), else in every training forward as
   in the original, which differs with gradient accumulation alone.
7. In evaluation neither the copy moves nor the queue; losses can be measured without changing the model.
8. False pairs are drawn by numbers that the batch may bring (`negative_draws`, as the recipes do) or by a `generator`; by the global
   generator only where neither is given. The same for text assignment (`assignment_draws`).
9. Images of any size that whole patches cover: the position table is interpolated, other sizes are an error; the original accepts one size.
10. Keys and values of an image are computed once for all texts that attend to it, the last block for the rows that are read, vocabulary
    logits at masked words alone. Plain and masked texts are encoded in one pass; of matching, true pairs and false texts are fused in one
    pass and false images in another, where the original has true pairs in one and false ones in the other. On a CPU texts, and answers, of
    similar length run together. Exact, but dropout draws other numbers.
11. Reasoning over two images begins with a momentum copy of what was loaded; the original copies before it loads, and is taught at random.
12. `rank_answers` compares no more answers than the list has; the original stops with an error where it is asked for more.
13. Text assignment has neither temperature nor projection of texts, which its loss never reads.
14. A query of retrieval whose true candidates are not among those reordered keeps its rank by contrast; in the original all that is not
    reordered ties, and places in the list decide.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import AutoModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from hf_vlp.layers.attention import AttendsInAnyWay, Attention, mask_of_keys
from hf_vlp.layers.blocks import Block
from hf_vlp.layers.encoder import Encoder
from hf_vlp.layers.initialization import InitializesEveryModule, torch_default_
from hf_vlp.layers.logit_scale import Temperature
from hf_vlp.layers.packing import reach_of, run_by_length
from hf_vlp.layers.patch_embedding import PatchEmbedding, resize_position_table
from hf_vlp.layers.pooling import unit_rows
from hf_vlp.layers.post_norm import KeyValues, PostNormBlock
from hf_vlp.layers.text_embeddings import TextEmbeddings
from hf_vlp.layers.timm_weights import timm_state_dict, timm_weights
from hf_vlp.layers.towers import (
    LoadsOutOfAPair,
    build_tower,
    fill_tower,
    require_pairs,
    require_shape,
    take_weights,
    token_states,
    tower_width,
)
from hf_vlp.models.albef.configuration_albef import VlpAlbefConfig, VlpAlbefTextConfig, VlpAlbefVisionConfig
from hf_vlp.momentum.queue import FeatureQueue
from hf_vlp.momentum.teacher import MomentumTeacher
from hf_vlp.outputs import CrossFusionOutput

BERT_NAMES = {  # of transformers' BERT -> of our blocks
    "attention.self.query": "attention.q_proj",
    "attention.self.key": "attention.k_proj",
    "attention.self.value": "attention.v_proj",
    "attention.output.dense": "attention.out_proj",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "output.LayerNorm": "output_norm",
}
TRAINING = r"^(temperature|itm_head|mlm_head|teacher|queue)\."  # what the base has no use for


class VlpAlbefPreTrainedModel(InitializesEveryModule, AttendsInAnyWay, PreTrainedModel):
    """Initialisation and capabilities of every ALBEF class."""

    config: VlpAlbefConfig
    base_model_prefix = "albef"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _no_split_modules = ["Block", "PostNormBlock", "TextEmbeddings", "VlpAlbefVisionEmbeddings"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """Normal with `initializer_range`, biases zero; the vision transformer as timm's, truncated at two whole units."""
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=std)  # the padding's row too, as the released code's
        elif isinstance(module, Block):
            for part in module.modules():
                if isinstance(part, nn.Linear):
                    init.trunc_normal_(part.weight, std=std)
        elif isinstance(module, VlpAlbefVisionEmbeddings):
            init.trunc_normal_(module.class_embedding, std=std)
            init.trunc_normal_(module.position_embedding, std=std)
            torch_default_(module.patch_embedding)
        elif isinstance(module, (Temperature, FeatureQueue)):
            module.reset_parameters()


class VlpAlbefTower(LoadsOutOfAPair, VlpAlbefPreTrainedModel):
    """One encoder alone: it also loads its part out of a folder that holds the whole model."""

    pair_prefix = "albef"
    pair_parts = (
        "text_model",
        "vision_model",
        "fusion_model",
        "text_projection",
        "visual_projection",
        "temperature",
        "itm_head",
        "mlm_head",
        "teacher",
        "queue",
    )


class VlpAlbefVisionEmbeddings(nn.Module):
    """Patches behind a class token, plus a learned position table that is interpolated to the image's grid."""

    def __init__(self, config: VlpAlbefVisionConfig):
        super().__init__()
        grid = config.image_size // config.patch_size
        self.class_embedding = nn.Parameter(torch.empty(config.hidden_size))
        self.patch_embedding = PatchEmbedding(config.num_channels, config.hidden_size, config.patch_size)
        self.position_embedding = nn.Parameter(torch.empty(1 + grid * grid, config.hidden_size))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`pixel_values` [B, 3, H, W] -> [B, 1 + P, D].

        Raises:
            ValueError: a side is no multiple of the patch, so that the rest would not be seen.
        """
        patch = self.patch_embedding.kernel_size[0]
        if pixel_values.shape[-2] % patch or pixel_values.shape[-1] % patch:
            raise ValueError(
                f"pixel_values of {list(pixel_values.shape[-2:])} pixels are no multiple of patches of {patch}: resize them, as the "
                "processor does"
            )
        patches = self.patch_embedding(pixel_values)  # [B, D, h, w]
        positions = resize_position_table(self.position_embedding, patches.shape[-2:])
        tokens = patches.flatten(2).transpose(1, 2)  # [B, P, D]
        classes = self.class_embedding.to(tokens.dtype).expand(len(tokens), 1, -1)
        return torch.cat([classes, tokens], dim=1) + positions


class VlpAlbefVisionModel(VlpAlbefTower):
    """The vision transformer (section 3.1)."""

    config: VlpAlbefVisionConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _can_record_outputs = {"hidden_states": Block, "attentions": Attention}

    def __init__(self, config: VlpAlbefVisionConfig):
        super().__init__(config)
        self.embeddings = VlpAlbefVisionEmbeddings(config)
        self.encoder = Encoder(
            Block(
                config,
                config.hidden_size,
                config.intermediate_size,
                config.num_attention_heads,
                hidden_act=config.hidden_act,
                norm_eps=config.layer_norm_eps,
                dropout=config.attention_dropout,
                hidden_dropout=config.hidden_dropout,
            )
            for _ in range(config.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.patch_embedding

    @torch.no_grad()
    def resize_image_positions(self, image_size: int) -> None:
        """Interpolate the position table for images of `image_size` pixels, to go on training at that resolution.

        Only needed to train on: a forward interpolates by itself where the image's grid is another.

        Raises:
            ValueError: `image_size` is no multiple of the patch.
        """
        patch = self.config.patch_size
        if image_size < patch or image_size % patch:
            raise ValueError(f"image_size {image_size} is no multiple of patches of {patch} pixels")
        table, grid = self.embeddings.position_embedding, image_size // patch
        self.embeddings.position_embedding = nn.Parameter(
            resize_position_table(table, (grid, grid)).clone(), requires_grad=table.requires_grad
        )
        self.config.image_size = image_size

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> BaseModelOutput:
        """`pixel_values` [B, 3, H, W] -> `last_hidden_state` [B, 1 + P, D] after the last norm, the class token first."""
        return BaseModelOutput(last_hidden_state=self.norm(self.encoder(self.embeddings(pixel_values), None, **kwargs)))


class VlpAlbefTextModel(VlpAlbefTower):
    """The text encoder: the embeddings and the first layers of BERT (section 3.1)."""

    config: VlpAlbefTextConfig
    base_model_prefix = "text_model"
    main_input_name = "input_ids"
    input_modalities = ("text",)
    _can_record_outputs = {"hidden_states": PostNormBlock, "attentions": Attention}

    def __init__(self, config: VlpAlbefTextConfig):
        super().__init__(config)
        self.embeddings = TextEmbeddings(
            config.vocab_size,
            config.max_position_embeddings,
            config.type_vocab_size,
            config.hidden_size,
            norm_eps=config.layer_norm_eps,
            dropout=config.hidden_dropout_prob,
            pad_token_id=config.pad_token_id,
        )
        self.encoder = Encoder(bert_blocks(config, config))
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding):
        self.embeddings.word_embeddings = value

    def resize_position_embeddings(self, new_num_position_embeddings: int) -> None:
        """Shorten or lengthen the position table; new rows are drawn as at initialisation and need training."""
        self.embeddings.resize_positions(new_num_position_embeddings, self.config.initializer_range)
        self.config.max_position_embeddings = new_num_position_embeddings

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput:
        """`input_ids`, `attention_mask` [B, L] -> `last_hidden_state` [B, L, D]; the first token stands for the text.

        `token_type_ids` [B, L]: segments, all 0 if not given, as the model was trained. `inputs_embeds` [B, L, D]: in place of the words'.
        """
        states = self.embeddings(input_ids, token_type_ids, inputs_embeds)
        mask = create_bidirectional_mask(self.config, inputs_embeds=states, attention_mask=attention_mask)
        return BaseModelOutput(last_hidden_state=self.encoder(states, mask, **kwargs))


def bert_blocks(
    config, sizes, key_value_size: int | None = None, count: int | None = None, is_causal: bool = False
) -> list[PostNormBlock]:
    """The blocks of a part with these `sizes`, or `count` of them; `config` has the attention implementation."""
    return [
        PostNormBlock(
            config,
            sizes.hidden_size,
            sizes.intermediate_size,
            sizes.num_attention_heads,
            hidden_act=sizes.hidden_act,
            norm_eps=sizes.layer_norm_eps,
            dropout=sizes.attention_probs_dropout_prob,
            hidden_dropout=sizes.hidden_dropout_prob,
            key_value_size=key_value_size,
            is_causal=is_causal,
        )
        for _ in range(sizes.num_hidden_layers if count is None else count)
    ]


class VlpAlbefFusionEncoder(nn.Module):
    """The multimodal encoder: words attend to each other, then to the image, in every layer (section 3.1)."""

    def __init__(self, config: VlpAlbefConfig):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(bert_blocks(config, config.multimodal_config, config.vision_config.hidden_size))
        self.gradient_checkpointing = False

    def keys_and_values(self, image_embeds: torch.Tensor) -> list[KeyValues]:
        """What the layers attend to of images [B, N, D], computed once for all texts that are read with them."""
        return [layer.cross_attention.keys_and_values(image_embeds) for layer in self.layers]

    def forward(
        self,
        text_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        images: list[KeyValues],
        rows: int | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """States of the words, those of all positions or of the first `rows`, whose last block alone is then computed.

        `text_embeds` [B * T, L, D], `attention_mask` [B * T, L]; `images`: `keys_and_values` of B images, each read with T neighbouring
        texts. Returns [B * T, L or rows, D].
        """
        *others, last = zip(self.layers, images, strict=True)
        states = text_embeds
        mask = create_bidirectional_mask(self.config, inputs_embeds=states, attention_mask=attention_mask)
        for layer, image in others:
            states = layer(states, mask, image, **kwargs)
        if rows is not None:
            mask = mask_of_keys(self.config, states[:, :rows], attention_mask, states)
        return last[0](states, mask, last[1], None, rows, **kwargs)

    def read(
        self,
        text_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        images: list[KeyValues],
        image_index: torch.Tensor | None,
        rows: int | None = None,
    ) -> torch.Tensor:
        """The same where text t is read with image `image_index[t]`; on a CPU texts of similar length run together.

        `text_embeds` [N, L, D], `attention_mask` [N, L], `image_index` [N], or None where each image is read with as many neighbouring
        texts -> [N, L or rows, D], what stands at padding not defined.
        """
        if attention_mask is None or text_embeds.device.type != "cpu" or torch.compiler.is_compiling():
            return self(text_embeds, attention_mask, images_of_texts(images, image_index), rows)
        count = len(images[0][0])

        def run(members: torch.Tensor | slice, reach: torch.Tensor) -> torch.Tensor:
            longest = int(reach.max())
            index = None if image_index is None else image_index[members]
            if index is None and count > 1 and not isinstance(members, slice):  # they are neighbours no more
                index = members // (len(text_embeds) // count)
            short = text_embeds[members, :longest], attention_mask[members, :longest]
            return self(*short, images_of_texts(images, index), rows)

        return run_by_length(reach_of(attention_mask), text_embeds.shape[1] if rows is None else rows, run)


def images_of_texts(images: list[KeyValues], image_index: torch.Tensor | slice | None) -> list[KeyValues]:
    """Keys and values of the image `image_index` [T] of each text; those of a slice are not copied. None: all, as they are."""
    if image_index is None:
        return images
    if isinstance(image_index, slice):
        return [(key[image_index], value[image_index]) for key, value in images]
    return [(key.index_select(0, image_index), value.index_select(0, image_index)) for key, value in images]


class VlpAlbefModel(VlpAlbefPreTrainedModel):
    """Image encoder, text encoder and the layers that fuse them; `add_projections`: with those into the joint space."""

    _can_record_outputs = {
        "hidden_states": PostNormBlock,
        "attentions": OutputRecorder(Attention, index=1, layer_name=".attention"),
        "cross_attentions": OutputRecorder(Attention, index=1, layer_name="cross_attention"),
    }
    _keys_to_ignore_on_load_unexpected = [TRAINING]

    def __init__(self, config: VlpAlbefConfig, add_projections: bool = True):
        super().__init__(config)
        self.vision_model = VlpAlbefVisionModel(config.vision_config)
        self.text_model = build_tower(config.text_config, pooler=False)
        self.fusion_model = VlpAlbefFusionEncoder(config)
        if add_projections:
            self.visual_projection = nn.Linear(config.vision_config.hidden_size, config.projection_dim)
            self.text_projection = nn.Linear(tower_width(self.text_model), config.projection_dim)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.text_model.set_input_embeddings(value)

    def resize_position_embeddings(self, new_num_position_embeddings: int) -> None:
        """Shorten or lengthen the text encoder's position table; new rows need training."""
        self.text_model.resize_position_embeddings(new_num_position_embeddings)

    def resize_image_positions(self, image_size: int) -> None:
        """Interpolate the image encoder's position table for images of `image_size` pixels; see its method."""
        self.vision_model.resize_image_positions(image_size)

    def fill_tower(self, name: str, tower: str | nn.Module) -> None:
        """Begin as the paper does: `vision_model` as a vision transformer of timm, `text_model` and the fusion layers as BERT's halves.

        Args:
            name: of the part.
            tower: for `vision_model` a name as "timm/deit_base_patch16_224", or a model of timm; for `text_model` a BERT of transformers,
                by name or as a model, of as many layers as both halves have. Its attention to the image stays new. Another text
                encoder than BERT is filled by a model of its class.

        Raises:
            ValueError: another part, or a model of other sizes.
        """
        if name == "vision_model":
            take_weights(self.vision_model, self._vision_weights(tower), ("encoder.",), f"{tower!s:.60}")
        elif name == "text_model" and isinstance(self.text_model, VlpAlbefTextModel):
            bert = tower if isinstance(tower, nn.Module) else AutoModel.from_pretrained(tower, dtype=torch.float32)
            needed = (
                "text_model.",
                *(f"fusion_model.layers.{i}.attention" for i in range(len(self.fusion_model.layers))),
            )
            take_weights(self, self._bert_weights(bert.base_model.state_dict()), needed, f"{type(bert).__name__}")
        else:
            fill_tower(self, name, tower)

    def _vision_weights(self, tower: str | nn.Module) -> dict[str, torch.Tensor]:
        state, table = timm_state_dict(tower), self.vision_model.embeddings.position_embedding
        grid = (round((len(table) - 1) ** 0.5),) * 2
        return {
            "embeddings.class_embedding": state["cls_token"].flatten(),
            "embeddings.position_embedding": resize_position_table(state["pos_embed"][0], grid),
            **timm_weights(state, "embeddings"),
        }

    def _bert_weights(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """BERT's weights under the names of both halves; a pooling layer is left out."""
        first, ours = len(self.text_model.encoder.layers), {}
        for name, tensor in state.items():
            if name.startswith("embeddings.") and tensor.is_floating_point():
                ours["text_model." + name.replace("LayerNorm", "norm")] = tensor
            elif name.startswith("encoder.layer."):
                number, part = name.removeprefix("encoder.layer.").split(".", 1)
                index = int(number)
                place = "text_model.encoder" if index < first else "fusion_model"
                module, kind = part.rsplit(".", 1)
                ours[f"{place}.layers.{index - first * (index >= first)}.{BERT_NAMES[module]}.{kind}"] = tensor
        return ours

    def encode_image(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """`pixel_values` [B, 3, H, W] -> `image_embeds` [B, 1 + P, D], to be computed once and read with many texts."""
        return {"image_embeds": self.vision_model(pixel_values).last_hidden_state}

    def encode_text(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask` [B, L] -> `text_embeds` [B, L, D], not defined at padding, and `attention_mask` [B, L]."""
        states = token_states(self.text_model, input_ids, attention_mask, attention_mask)
        return {
            "text_embeds": states,
            "attention_mask": torch.ones_like(input_ids) if attention_mask is None else attention_mask,
        }

    def fuse(
        self,
        text_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        image_embeds: torch.Tensor,
        rows: int | None = None,
    ) -> torch.Tensor:
        """Encoded texts read with encoded images.

        Args:
            text_embeds, attention_mask: [B * T, L, D] and [B * T, L]: T texts for each image, those of an image side by side.
            image_embeds: [B, 1 + P, D].
            rows: only the first so many positions.

        Returns:
            [B * T, L or rows, D].

        Raises:
            ValueError: the texts are no multiple of the images.
        """
        if not len(image_embeds) or len(text_embeds) % len(image_embeds):
            raise ValueError(
                f"{len(text_embeds)} texts cannot be dealt to {len(image_embeds)} images: give each image as many, its own side by side"
            )
        images = self.fusion_model.keys_and_values(image_embeds)
        if len(text_embeds) == len(image_embeds):
            return self.fusion_model.read(text_embeds, attention_mask, images, None, rows)
        return self.fusion_model(text_embeds, attention_mask, images, rows)

    def project_image(self, image_embeds: torch.Tensor) -> torch.Tensor:
        """Unit vectors [B, E] of encoded images [B, 1 + P, D].

        Raises:
            ValueError: the model has no projection of images.
        """
        self._require_projection("visual_projection")
        return unit_rows(self.visual_projection(image_embeds[:, 0]))

    def project_text(self, text_embeds: torch.Tensor) -> torch.Tensor:
        """Unit vectors [B, E] of encoded texts [B, L, D].

        Raises:
            ValueError: the model has no projection of texts.
        """
        self._require_projection("text_projection")
        return unit_rows(self.text_projection(text_embeds[:, 0]))

    def _require_projection(self, name: str) -> None:
        if getattr(self, name, None) is None:
            raise ValueError(
                f"this model has no {name} into the joint space, which its task does not read: load the folder with VlpAlbefModel or "
                "VlpAlbefForPreTraining"
            )

    def cross_attention(self, layer: int | None = None) -> Attention:
        """The attention of words to the image in a layer, counted from 0 over text and fusion layers.

        None: the third that fuses, as in the paper, or the last but one of fewer, as after the last only the first word is read.

        Raises:
            ValueError: a layer without it, or that does not exist.
        """
        first, layers = self.config.text_config.num_hidden_layers, self.fusion_model.layers
        place = max(0, min(2, len(layers) - 2)) if layer is None else layer - first
        if not 0 <= place < len(layers):
            raise ValueError(
                f"layer {layer} has no attention to the image: choose one of {first} to {first + len(layers) - 1}, the fusion layers"
            )
        return layers[place].cross_attention

    def image_attention(self, block: int) -> Attention:
        """The self-attention of block `block` of the image encoder, counted from 0.

        Raises:
            ValueError: no such block.
        """
        layers = self.vision_model.encoder.layers
        if not 0 <= block < len(layers):
            raise ValueError(f"the image encoder has no block {block}: choose one of 0 to {len(layers) - 1}")
        return layers[block].attention

    def get_image_features(
        self, pixel_values: torch.Tensor | None = None, image_embeds: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`pixel_values` [B, 3, H, W], or what `encode_image` made of them -> unit vectors [B, E]."""
        return self.project_image(
            self.encode_image(pixel_values)["image_embeds"] if image_embeds is None else image_embeds
        )

    def get_text_features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """`input_ids`, `attention_mask` [B, L] -> unit vectors [B, E]."""
        return self.project_text(self.encode_text(input_ids, attention_mask)["text_embeds"])

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CrossFusionOutput:
        """Words read with images, all layers and all positions.

        `input_ids`, `attention_mask` [B, L]; `pixel_values` [B, 3, H, W], or `image_embeds` [B, 1 + P, D] as `encode_image` returned them.

        Raises:
            ValueError: words or image missing, pixels and an encoded image, another number of images than texts.
        """
        if input_ids is None or (pixel_values is None) == (image_embeds is None):
            raise ValueError(
                "ALBEF's forward needs input_ids and either pixel_values or image_embeds; for one side call get_text_features or "
                "get_image_features"
            )
        if image_embeds is None:
            image_embeds = self.encode_image(pixel_values)["image_embeds"]
        require_pairs(input_ids=input_ids, image=image_embeds)
        require_shape(input_ids.shape, attention_mask=attention_mask)
        text = self.text_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        images = self.fusion_model.keys_and_values(image_embeds)
        states = self.fusion_model(text, attention_mask, images, **kwargs)
        embeds = {}
        if getattr(self, "text_projection", None) is not None:
            embeds = {"image_embeds": self.project_image(image_embeds), "text_embeds": self.project_text(text)}
        return CrossFusionOutput(
            last_hidden_state=states, text_hidden_states=text, image_hidden_states=image_embeds, **embeds
        )


class VlpAlbefTaught(VlpAlbefPreTrainedModel):
    """The model under a head, and the momentum copy of `taught_parts` that gives soft targets in training.

    A class calls `add_teacher` when its parts are there; the copy exists where the configuration has one.
    """

    _keys_to_ignore_on_load_missing = [r"^teacher\."]
    taught_parts: tuple[str, ...] = ("albef",)

    def __init__(self, config: VlpAlbefConfig, add_projections: bool = True):
        super().__init__(config)
        self.albef = VlpAlbefModel(config, add_projections)
        self.distillation_weight = float(config.distillation_weight)

    def students(self) -> dict[str, nn.Module]:
        """What the momentum copy is of."""
        return {name: getattr(self, name) for name in self.taught_parts}

    def add_teacher(self) -> None:
        """The momentum copy, where the configuration has one."""
        if self.config.momentum_teacher:
            self.teacher = MomentumTeacher(self.config.momentum, **self.students())

    def move_teacher(self) -> None:
        """The momentum copy goes a step towards the model, in training and if it is due."""
        if self.training and self.teacher.due:
            self.teacher.update(**self.students())

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """What a checkpoint lacks of the momentum copy begins as the model's own weights."""
        super()._init_weights(module)
        if module is self and hasattr(self, "teacher"):
            self.teacher.copy_(**self.students())

    def before_step(self) -> None:
        """To be called before every optimizer step: the momentum copy then moves once in it, however many batches it has."""
        if hasattr(self, "teacher"):
            self.teacher.before_step()

    def ramps(self) -> dict[str, Any]:
        """Numbers that a recipe may change while training: alpha of the distillation, where there is a momentum copy."""
        return {"distillation_weight": self._set_distillation_weight} if hasattr(self, "teacher") else {}

    def _set_distillation_weight(self, value: float) -> None:
        if not 0 <= value <= 1:
            raise ValueError(f"distillation_weight {value} must lie between 0 and 1")
        self.distillation_weight = float(value)

    def fill_tower(self, name: str, tower: str | nn.Module) -> None:
        """See `VlpAlbefModel.fill_tower`; what begins as a copy of the model's parts and the momentum copy begin so anew."""
        self.albef.fill_tower(name, tower)
        if name == "text_model":
            self.begin_copies(torch.Tensor.copy_)
        if hasattr(self, "teacher"):
            self.teacher.become(**self.students())

    def begin_copies(self, copy: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        """What begins as a copy of the model's text half does so, by `copy` of the second tensor into the first."""

    @torch.no_grad()
    def resize_position_embeddings(self, new_num_position_embeddings: int) -> None:
        """See `VlpAlbefModel.resize_position_embeddings`; the momentum copy's rows go on as they are, and new ones begin as the model's."""
        self.albef.resize_position_embeddings(new_num_position_embeddings)
        self.config.text_config.max_position_embeddings = new_num_position_embeddings
        self._resize_teacher()

    def _resize_teacher(self) -> None:
        """The momentum copy gets tables of the model's sizes, with its own rows as far as it has them."""
        if hasattr(self, "teacher"):
            before = dict(self.teacher.named_parameters())
            self.teacher = MomentumTeacher(self.config.momentum, **self.students())
            self.tie_weights()
            for name, tensor in self.teacher.named_parameters():
                kept = min(len(before[name]), len(tensor))
                tensor[:kept] = before[name][:kept]

    def resize_image_positions(self, image_size: int) -> None:
        """See `VlpAlbefVisionModel.resize_image_positions`; the momentum copy's table as well."""
        self.albef.resize_image_positions(image_size)
        if hasattr(self, "teacher"):
            self.teacher.albef.resize_image_positions(image_size)
        self.config.vision_config.image_size = image_size

    @torch.no_grad()
    def resize_token_embeddings(self, *args, **kwargs) -> nn.Module:
        """As in transformers; the momentum copy's rows of words go on as they are, and new ones begin as the model's."""
        words = super().resize_token_embeddings(*args, **kwargs)
        self._resize_teacher()
        return words

    def encode_image(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """See `VlpAlbefModel.encode_image`."""
        return self.albef.encode_image(pixel_values)

    def encode_text(self, *args, **kwargs) -> dict[str, torch.Tensor]:
        """See `VlpAlbefModel.encode_text`."""
        return self.albef.encode_text(*args, **kwargs)
