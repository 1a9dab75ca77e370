"""ViLT: words and patches in one transformer, without any encoder before it.

Paper: "ViLT: Vision-and-Language Transformer Without Convolution or Region Supervision", https://arxiv.org/abs/2102.03334.

Differences from the released code:
1. Patches keep their raster order and padding comes last; the original permutes the patches of every image at random, in evaluation too.
   What is pooled does not depend on it.
2. Real pixels are told by `pixel_mask`; the original takes a pixel whose channels add up to 0 for padding, which is the same for 8-bit
   pictures in float32 or float16.
3. Patches are left out in training alone, by a selection in the batch (`patch_index`), which the collator draws from a seeded generator.
4. Masked patch prediction works: the original lacks the `mask_token` that it needs. Its colours are whole numbers as in the original.
5. A batch without a masked word has a loss of 0 for that term; the original's is not a number.
6. Logits over the vocabulary are computed at masked words alone, the last block for those rows alone that are read, and on a CPU
   padding is left out of the attention: exact, but dropout draws other numbers.
7. The rank head is a copy of row 1 of the matching head where a checkpoint lacks it; the original shares its memory, so that on a CPU
   training the one changes the other.
8. Distances of word-patch alignment may be found by other solvers of optimal transport than IPOT (`wpa_solver`).
9. A text of special tokens alone, an image given encoded, several texts an image and texts up to the length of the table are allowed.
10. A false image or text is never of the pair's own image (`allow_true` of the collators restores the original's draw).
11. The DeiT variants, of which no weights were published, do not exist here.
"""

from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from hf_vlp.inputs.patch_selection import patch_mask, raster_patches
from hf_vlp.layers.attention import AttendsInAnyWay, Attention
from hf_vlp.layers.blocks import Block
from hf_vlp.layers.encoder import Encoder
from hf_vlp.layers.heads import MaskedTokenHead, PredictsWords
from hf_vlp.layers.initialization import InitializesEveryModule, torch_default_
from hf_vlp.layers.packing import read_states
from hf_vlp.layers.patch_embedding import PatchEmbedding, fitted_positions, resize_position_table
from hf_vlp.layers.text_embeddings import TextEmbeddings
from hf_vlp.layers.timm_weights import timm_state_dict, timm_weights
from hf_vlp.layers.towers import require_pairs, take_weights
from hf_vlp.models.vilt.configuration_vilt import VlpViltConfig
from hf_vlp.objectives.masked_prediction import COLOURS, IGNORED, masked_prediction_loss, patch_colours
from hf_vlp.objectives.word_patch_alignment import word_patch_alignment_loss
from hf_vlp.outputs import FusionOutput, PreTrainingOutput

MATCH = 1  # row of the matching head
Image = dict[str, torch.Tensor]


class VlpViltPreTrainedModel(InitializesEveryModule, AttendsInAnyWay, PreTrainedModel):
    """Initialisation and capabilities of every ViLT class."""

    config: VlpViltConfig
    base_model_prefix = "vilt"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _no_split_modules = ["Block", "TextEmbeddings", "VlpViltImageEmbeddings"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """Normal with `initializer_range`, biases zero; the transformer as timm's, truncated at two whole units."""
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=std)  # the padding's row too, as in the released code
        elif isinstance(module, Block):
            for part in module.modules():
                if isinstance(part, nn.Linear):
                    init.trunc_normal_(part.weight, std=std)
        elif isinstance(module, VlpViltImageEmbeddings):
            for table in (module.class_token, module.position_embedding, module.mask_token):
                if table is not None:
                    init.trunc_normal_(table, std=std)
            torch_default_(module.patch_embedding)

    def get_image_features(self, *args, **kwargs):
        """ViLT embeds no side alone.

        Raises:
            ValueError: always; names `score_pairs`.
        """
        raise ValueError(
            "ViLT reads words and image together and embeds neither alone: score pairs with score_pairs of "
            "VlpViltForImageTextRetrieval or VlpViltForPreTraining (encode_image computes the image's part once)"
        )

    get_text_features = get_image_features


class VlpViltImageEmbeddings(nn.Module):
    """A class token and the linear patches of an image of any size, with the position table fitted to each image."""

    def __init__(self, config: VlpViltConfig):
        super().__init__()
        grid = config.image_size // config.patch_size
        self.patch_size = config.patch_size
        self.class_token = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        self.position_embedding = nn.Parameter(torch.empty(1 + grid * grid, config.hidden_size))
        self.patch_embedding = PatchEmbedding(config.num_channels, config.hidden_size, config.patch_size)
        self.mask_token = nn.Parameter(torch.empty(1, 1, config.hidden_size)) if config.mpp_weight > 0 else None

    def forward(
        self,
        pixel_values: torch.Tensor,
        pixel_mask: torch.Tensor | None = None,
        patch_index: torch.Tensor | None = None,
        replaced: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[int, int]]:
        """Embedded patches of images of mixed sizes, real ones first.

        Args:
            pixel_values: [B, 3, H, W], padded on the right and below. pixel_mask: [B, H, W], 1 at real pixels; None: all are.
            patch_index: [B, n], the patches to keep, as `hf_vlp.inputs.patch_selection` counts them; None: every real one in order.
            replaced: [B, P] over the canvas, 1 where the mask token takes the patch's place.

        Returns:
            embeddings [B, 1 + n, D] before dropout; mask [B, 1 + n]; patch_index [B, n]; (h, w), patches of the canvas.

        Raises:
            ValueError: a mask of another shape, and on the CPU an image whose mask is 0 everywhere.
        """
        patches = self.patch_embedding(pixel_values)  # [B, D, h, w]
        grid = tuple(patches.shape[-2:])
        patches = patches.flatten(2).transpose(1, 2)  # [B, P, D]
        if replaced is not None:
            patches = torch.where(replaced.bool().unsqueeze(-1), self.mask_token.to(patches.dtype), patches)
        if pixel_mask is None:
            visible = torch.ones(len(patches), *grid, dtype=torch.long, device=patches.device)
            heights, widths = torch.tensor(grid, device=patches.device).split(1)  # of all images alike
        else:
            if pixel_mask.shape != (len(pixel_values), *pixel_values.shape[-2:]):
                raise ValueError(
                    f"pixel_mask must be {[len(pixel_values), *pixel_values.shape[-2:]]} as pixel_values are, got {list(pixel_mask.shape)}"
                )
            visible = patch_mask(pixel_mask, self.patch_size)  # [B, h, w]
            refuse_invisible(visible)
            heights, widths = visible[:, :, 0].sum(dim=1), visible[:, 0].sum(dim=1)
        positions = fitted_positions(self.position_embedding[1:], heights, widths, grid)
        # not in the type of the patches: under autocast what blocks add to stays in float32
        tokens = patches + positions.to(self.position_embedding.dtype)
        if patch_index is None and pixel_mask is None:
            patch_index = torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)
        else:
            patch_index = raster_patches(visible) if patch_index is None else patch_index
            tokens = tokens.gather(1, patch_index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
        mask = nn.functional.pad(visible.flatten(1).gather(1, patch_index).long(), (1, 0), value=1)
        classes = (self.class_token + self.position_embedding[0]).to(tokens.dtype).expand(len(tokens), 1, -1)
        return torch.cat([classes, tokens], dim=1), mask, patch_index, grid


def refuse_invisible(visible: torch.Tensor) -> None:
    """Refuse, on the CPU, images of `visible` [B, h, w] without any real patch.

    Raises:
        ValueError: naming the rows.
    """
    if torch.compiler.is_compiling() or visible.device.type != "cpu":
        return
    empty = visible.flatten(1).eq(0).all(dim=1)
    if empty.any():
        raise ValueError(
            f"row(s) {empty.nonzero().flatten().tolist()[:10]} of pixel_mask are 0 at every patch: give each image real pixels, "
            "from its upper left corner on"
        )


class VlpViltPooler(nn.Module):
    """Linear and tanh on the first word's state."""

    def __init__(self, config: VlpViltConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        """[B, D] -> [B, D]."""
        return self.dense(state).tanh()


class VlpViltModel(VlpViltPreTrainedModel):
    """The transformer over [words; class token; patches] (section 3.1); `add_pooling_layer`: with the layer that pools the first word."""

    _can_record_outputs = {"hidden_states": Block, "attentions": Attention}
    _keys_to_ignore_on_load_unexpected = [r"^\w+_head\.", r"^classifier\.", r"^second_image_embedding$"]  # of the tasks

    def __init__(self, config: VlpViltConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        self.text_embeddings = TextEmbeddings(
            config.vocab_size,
            config.max_position_embeddings,
            config.type_vocab_size,
            config.hidden_size,
            norm_eps=config.text_layer_norm_eps,
            dropout=config.hidden_dropout_prob,
            pad_token_id=config.pad_token_id,
        )
        self.modality_embeddings = nn.Embedding(2, config.hidden_size)  # of words, of images
        self.image_embeddings = VlpViltImageEmbeddings(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.encoder = Encoder(
            Block(
                config,
                config.hidden_size,
                config.intermediate_size,
                config.num_attention_heads,
                hidden_act=config.hidden_act,
                norm_eps=config.layer_norm_eps,
                hidden_dropout=config.hidden_dropout_prob,
            )
            for _ in range(config.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.pooler = VlpViltPooler(config) if add_pooling_layer else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.text_embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding):
        self.text_embeddings.word_embeddings = value

    @torch.no_grad()
    def resize_position_embeddings(self, new_num_position_embeddings: int) -> None:
        """Shorten or lengthen the position table of the words; new rows are drawn as at initialisation and need training."""
        self.text_embeddings.resize_positions(new_num_position_embeddings, self.config.initializer_range)
        self.config.max_position_embeddings = new_num_position_embeddings

    @torch.no_grad()
    def resize_image_positions(self, image_size: int) -> None:
        """Interpolate the position table of the patches, to go on with images whose shorter side has `image_size` pixels.

        Only needed to train on: a forward fits the table to each image by itself.

        Raises:
            ValueError: `image_size` below one patch.
        """
        grid = image_size // self.config.patch_size
        if grid < 1:
            raise ValueError(f"image_size {image_size} is smaller than one patch of {self.config.patch_size}")
        table, side = self.image_embeddings.position_embedding, torch.tensor([grid])
        fitted = fitted_positions(table[1:].cpu(), side, side, (grid, grid))[0].to(table)  # as a forward sees it
        self.image_embeddings.position_embedding = nn.Parameter(torch.cat([table[:1], fitted]))
        self.config.image_size = image_size

    @torch.no_grad()
    def fill_tower(self, name: str, tower: Any) -> None:
        """Take class token, positions, patches, blocks and the last norm of a vision transformer of timm, as the paper begins.

        Args:
            name: "image", the only part that can be filled.
            tower: a name as "timm/vit_base_patch32_384.augreg_in21k_ft_in1k", or a model of timm.

        Raises:
            ValueError: another part, or a transformer of other sizes.
        """
        if name != "image":
            raise ValueError(f"{type(self).__name__} has no tower {name!r}; it has image")
        state = timm_state_dict(tower)
        image = self.image_embeddings
        grid = (round((len(image.position_embedding) - 1) ** 0.5),) * 2
        ours = {
            "image_embeddings.class_token": state["cls_token"],
            "image_embeddings.position_embedding": resize_position_table(state["pos_embed"][0], grid, mode="bilinear"),
            **timm_weights(state, "image_embeddings"),
        }
        sizes = f"{self.config.num_hidden_layers} blocks, width {self.config.hidden_size}, patches of {self.config.patch_size}"
        take_weights(self, ours, ("encoder.",), f"the vision transformer given (wanted: {sizes})")

    def encode_image(
        self,
        pixel_values: torch.Tensor,
        pixel_mask: torch.Tensor | None = None,
        patch_index: torch.Tensor | None = None,
    ) -> Image:
        """What the transformer is handed of images, to be computed once and read with many texts.

        `pixel_values` [B, 3, H, W], `pixel_mask` [B, H, W], `patch_index` [B, P] as in `forward` -> `image_embeds` [B, 1 + P, D] and
        `image_mask` [B, 1 + P], which `forward` and `score_pairs` take instead. Padding behind an image's last patch may be cut off.
        """
        embeds, mask, _, _ = self.image_embeddings(pixel_values, pixel_mask, patch_index)
        return {"image_embeds": embeds, "image_mask": mask}

    def joined(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        image_embeds: torch.Tensor,
        image_mask: torch.Tensor | None,
        image_modality: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The sequence that the blocks read [B, L + 1 + P, D], and its mask.

        `image_modality`: [B, 1, D], added to the images in place of the table's row.
        """
        require_pairs(input_ids=input_ids, image=image_embeds)
        words, image = self.modality_embeddings.weight
        text = self.text_embeddings(input_ids) + words
        image = self.dropout(image_embeds) + (image if image_modality is None else image_modality)
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        image_mask = image_mask if image_mask is not None else attention_mask.new_ones(image_embeds.shape[:2])
        return torch.cat([text, image], dim=1), torch.cat([attention_mask, image_mask], dim=1)

    def read(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        image: Image,
        rows: int | None = None,
        image_modality: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Normed states of the first `rows` positions (None: all) of words and image read together, [B, rows, D].

        The same as `forward(...).last_hidden_state` at real positions, without the work for padding and for what is not read.
        """
        states, mask = self.joined(input_ids, attention_mask, **image, image_modality=image_modality)
        return self.norm(read_states(self.encoder.layers, self.config, states, mask, rows))

    def pooled(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, image: Image, **kwargs
    ) -> torch.Tensor:
        """`forward(...).pooler_output` [B, D], with the last block computed for the first word alone."""
        return self.pooler(self.read(input_ids, attention_mask, image, 1, **kwargs)[:, 0])

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        patch_index: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
        image_mask: torch.Tensor | None = None,
        image_modality: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> FusionOutput:
        """Words and image read together.

        Args:
            input_ids: [B, L], padded on the right. attention_mask: [B, L].
            pixel_values: [B, 3, H, W], images of any size, padded on the right and below. pixel_mask: [B, H, W], 1 at real pixels;
                None where all are.
            patch_index: [B, P], the patches to keep; None for all.
            image_embeds, image_mask: what `encode_image` returned, instead of pixels.
            image_modality: [B, 1, D], added to each image in place of the modality table's row.

        Returns:
            States after the last norm and the pooled one. Padding positions hold states as well, which nothing should read.

        Raises:
            ValueError: words or image missing, pixels and an encoded image, another number of images than texts.
        """
        if input_ids is None or (pixel_values is None) == (image_embeds is None):
            raise ValueError(
                "ViLT's forward needs input_ids and either pixel_values or image_embeds: it reads both sides together"
            )
        index = grid = None
        if image_embeds is None:
            image_embeds, image_mask, index, grid = self.image_embeddings(pixel_values, pixel_mask, patch_index)
        states, mask = self.joined(input_ids, attention_mask, image_embeds, image_mask, image_modality)
        attend = create_bidirectional_mask(self.config, inputs_embeds=states, attention_mask=mask)
        states = self.norm(self.encoder(states, attend, **kwargs))
        length = input_ids.shape[1]
        return FusionOutput(
            last_hidden_state=states,
            pooler_output=None if self.pooler is None else self.pooler(states[:, 0]),
            text_hidden_states=states[:, :length],
            image_hidden_states=states[:, length:],
            image_mask=mask[:, length:],
            patch_index=index,
            patch_grid=grid,
        )


def images_of(model: VlpViltModel, image: dict[str, torch.Tensor | None]) -> Image:
    """Images as `encode_image` returns them, from pixels or from the same given.

    Raises:
        ValueError: neither or both.
    """
    given = {name: value for name, value in image.items() if value is not None}
    if ("pixel_values" in given) == ("image_embeds" in given):
        raise ValueError("give either pixel_values or image_embeds: ViLT reads words and image together")
    return given if "image_embeds" in given else model.encode_image(**given)


class VlpViltForPreTraining(PredictsWords, VlpViltPreTrainedModel):
    """Masked words, matching, word-patch alignment and masked patches (sections 3.2 and 3.3), whichever the configuration weighs.

    Masked words need masked text, matching needs whole text and sometimes another image: in one stream that is a pass each.
    """

    def __init__(self, config: VlpViltConfig):
        super().__init__(config)
        self.vilt = VlpViltModel(config, add_pooling_layer=config.itm_weight > 0)
        form = (config.hidden_act, config.text_layer_norm_eps)
        if config.mlm_weight > 0:
            self.mlm_head = MaskedTokenHead(config.hidden_size, config.vocab_size, *form)
        if config.itm_weight > 0:
            self.itm_head = nn.Linear(config.hidden_size, 2)
        if config.mpp_weight > 0:
            self.mpp_head = MaskedTokenHead(config.hidden_size, config.num_channels * COLOURS, *form)
        self.post_init()

    def encode_image(self, *args, **kwargs) -> Image:
        """See `VlpViltModel.encode_image`."""
        return self.vilt.encode_image(*args, **kwargs)

    def resize_image_positions(self, image_size: int) -> None:
        """See `VlpViltModel.resize_image_positions`."""
        self.vilt.resize_image_positions(image_size)

    def score_pairs(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **image: torch.Tensor
    ) -> torch.Tensor:
        """Logit of matching of each text with the image of the same row, [B]; higher is a better match. Zero-shot retrieval of the paper
        ranks by it.

        `image`: what `encode_image` takes or what it returned.

        Raises:
            ValueError: a model without a matching head.
        """
        if not hasattr(self, "itm_head"):
            raise ValueError("this model has no matching head: itm_weight is 0 in its configuration")
        return self.itm_head(self.vilt.pooled(input_ids, attention_mask, images_of(self.vilt, image)))[:, MATCH]

    def masked_words(self, mlm_input_ids, attention_mask, mlm_labels, image: Image) -> tuple[torch.Tensor, ...]:
        """Masked language modelling on `mlm_input_ids` [B, L] with targets `mlm_labels` [B, L]: loss, correct, count."""
        states = self.vilt.read(mlm_input_ids, attention_mask, image, mlm_input_ids.shape[1])
        return masked_prediction_loss(states, mlm_labels, self.mlm_head)

    def matching(
        self, input_ids, attention_mask, itm_labels, image: Image
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Image-text matching, and on its states word-patch alignment: loss, correct, the alignment's loss or None."""
        aligned = self.config.wpa_weight > 0
        states = self.vilt.read(input_ids, attention_mask, image, None if aligned else 1)
        logits = self.itm_head(self.vilt.pooler(states[:, 0])).float()
        loss = nn.functional.cross_entropy(logits, itm_labels)
        correct = logits.detach().argmax(dim=-1).eq(itm_labels).sum()
        if not aligned:
            return loss, correct, None
        length = input_ids.shape[1]
        words = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        alignment = word_patch_alignment_loss(
            states[:, :length],
            states[:, length:],
            words,
            image["image_mask"],
            itm_labels,
            solver=self.config.wpa_solver,
            beta=self.config.wpa_beta,
            iterations=self.config.wpa_iterations,
        )
        return loss, correct, alignment

    def masked_patches(
        self, input_ids, attention_mask, pixel_values, pixel_mask, patch_index, mpp_mask, mpp_replace
    ) -> tuple[torch.Tensor, ...]:
        """Masked patch prediction (section 3.3): the mean colours of the patches of `mpp_mask` [B, P], of which those of `mpp_replace`
        are hidden. Loss, correct, count."""
        embeds, mask, index, _ = self.vilt.image_embeddings(
            pixel_values, pixel_mask, patch_index, mpp_mask * mpp_replace
        )
        image = {"image_embeds": embeds, "image_mask": mask}
        states = self.vilt.read(input_ids, attention_mask, image)[:, input_ids.shape[1] + 1 :]
        labels = self.patch_labels(pixel_values, mpp_mask, index, mask[:, 1:])
        return masked_prediction_loss(states, labels, self.mpp_head)

    def patch_labels(self, pixel_values, mpp_mask, patch_index, seen) -> torch.Tensor:
        """Colours [B, n, 3] of the patches of `patch_index` [B, n], -100 but for those of `mpp_mask` [B, P] that are real, 1 in `seen`
        [B, n]."""
        colours = patch_colours(pixel_values, self.config.patch_size)  # [B, P, 3]
        colours = colours.masked_fill(mpp_mask.eq(0).unsqueeze(-1), IGNORED)
        labels = colours.gather(1, patch_index.unsqueeze(-1).expand(-1, -1, colours.shape[-1]))
        return labels.masked_fill(seen.eq(0).unsqueeze(-1), IGNORED)

    @merge_with_config_defaults
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        mlm_input_ids: torch.Tensor | None = None,
        mlm_labels: torch.Tensor | None = None,
        itm_pixel_values: torch.Tensor | None = None,
        itm_pixel_mask: torch.Tensor | None = None,
        itm_labels: torch.Tensor | None = None,
        patch_index: torch.Tensor | None = None,
        itm_patch_index: torch.Tensor | None = None,
        mpp_patch_index: torch.Tensor | None = None,
        mpp_mask: torch.Tensor | None = None,
        mpp_replace: torch.Tensor | None = None,
        image_ids: torch.Tensor | None = None,
    ) -> PreTrainingOutput:
        """One loss of every term that the configuration weighs; the collator makes the batch.

        Args:
            input_ids, attention_mask: [B, L], whole texts. pixel_values [B, 3, H, W], pixel_mask [B, H, W]: their images.
            mlm_input_ids: [B, L], texts with masked words. mlm_labels: [B, L], the words masked, -100 elsewhere.
            itm_pixel_values, itm_pixel_mask: the image of each text where itm_labels [B] is 1, another where it is 0.
            patch_index, itm_patch_index, mpp_patch_index: [B, n], patches kept in the pass of masked words, of matching and of masked
                patches; None for all.
            mpp_mask, mpp_replace: [B, P] over the canvas, patches to be predicted, and those whose content is hidden among them.
            image_ids: [B], not needed: each text has one image only.

        Returns:
            loss; losses "mlm", "itm", "wpa" and "mim" (masked patches), as far as weighed; correct and counts of the first two and the
            last.

        Raises:
            ValueError: what an active term needs is missing, rows do not fit, or no term is active.
        """
        config = self.config
        batch = {
            "input_ids": input_ids,
            "pixel_values": pixel_values,
            "mlm_input_ids": mlm_input_ids,
            "mlm_labels": mlm_labels,
            "itm_pixel_values": itm_pixel_values,
            "itm_labels": itm_labels,
            "mpp_mask": mpp_mask,
            "mpp_replace": mpp_replace,
        }
        self._require(batch, "pixel_values")
        require_pairs(**batch)
        losses, correct, counts = {}, {}, {}
        if config.mlm_weight > 0:
            self._require(batch, "mlm_input_ids", "mlm_labels")
            image = self.vilt.encode_image(pixel_values, pixel_mask, patch_index)
            losses["mlm"], correct["mlm"], counts["mlm"] = self.masked_words(
                mlm_input_ids, attention_mask, mlm_labels, image
            )
        if config.mpp_weight > 0:
            self._require(batch, "input_ids", "mpp_mask", "mpp_replace")
            losses["mim"], correct["mim"], counts["mim"] = self.masked_patches(
                input_ids, attention_mask, pixel_values, pixel_mask, mpp_patch_index, mpp_mask, mpp_replace
            )
        if config.itm_weight > 0:
            self._require(batch, "input_ids", "itm_pixel_values", "itm_labels")
            image = self.vilt.encode_image(itm_pixel_values, itm_pixel_mask, itm_patch_index)
            losses["itm"], correct["itm"], alignment = self.matching(input_ids, attention_mask, itm_labels, image)
            counts["itm"] = torch.full_like(correct["itm"], len(itm_labels))
            if alignment is not None:
                losses["wpa"] = alignment
        if not losses:
            raise ValueError(
                "every term of pre-training has weight 0 in this configuration: set mlm_weight, itm_weight or mpp_weight above 0"
            )
        weights = {
            "mlm": config.mlm_weight,
            "itm": config.itm_weight,
            "wpa": config.wpa_weight,
            "mim": config.mpp_weight,
        }
        loss = sum(weights[name] * value for name, value in losses.items())
        return PreTrainingOutput(loss, losses, correct=correct, counts=counts)

    @staticmethod
    def _require(batch: dict[str, torch.Tensor | None], *names: str) -> None:
        missing = [name for name in names if batch[name] is None]
        if missing:
            raise ValueError(
                f"pre-training needs {', '.join(missing)} in the batch for the terms that the configuration weighs: let the collator make "
                "it, or set the weight of the term to 0"
            )
