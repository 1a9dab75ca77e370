"""VSE-infinity's rows of the benchmark: region store, pooling, training step and evaluation, with random weights.

Published sizes of the region + BERT variant: BERT base, 36 regions of 2,048 numbers, a joint space of 1,024. Ours share one set of
parameters, the plain formulation has a second one, which is the first under the released names.

As in the recipe, regions are dropped at random: an image has 24 to 36, and both formulations take the batch norm's statistics over all
rows with the padding. Captions of "real lengths": see `contenders`. The original pads them to the longest of the batch and computes all
of it; so does our processor, and the model leaves out what it can. Dropout is on while time is taken and off while results are compared.
"""

import functools
from collections.abc import Iterator

import numpy as np
import torch
from transformers import BertConfig
from transformers.initialization import no_init_weights

from benchmarks import vse_plain
from benchmarks.contenders import ATTENTION, forward, lengths_of, parameters_and_buffers, real_lengths, step
from benchmarks.measure import BASE, Call, Contender, Settings, TimedRow, count_flops
from benchmarks.regions import store_rows
from conversion.tables import revert
from conversion.vse_layouts import vse_table
from hf_vlp import VlpVseConfig, VlpVseForPreTraining
from hf_vlp.evaluation.ranks import ranks_both_ways
from hf_vlp.layers.pooling import GeneralizedPooling
from hf_vlp.training.optim import adamw, parameter_groups

BATCH = 128  # the paper's, unless given
DROPOUT, DECAY, CLIP_NORM = 0.1, 1e-4, 2.0
MARK, FIRST_WORD = 100, 103  # ids below the first word are marks; 0 pads
CAPTIONS = 5  # of an image
NOISE = 12.0  # between an image and its captions, in lengths of the image's vector: recalls between none and all


def configuration(settings: Settings) -> VlpVseConfig:
    """The published sizes, or with `settings.small` a few thousand weights."""
    if not settings.small:
        return VlpVseConfig(text_config=BertConfig(), region_norm_rows="all")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = BertConfig(vocab_size=300, max_position_embeddings=64, **sizes)
    return VlpVseConfig(text_config=text, region_size=24, projection_dim=16, region_norm_rows="all")


def region_lengths(count: int, most: int) -> torch.Tensor:
    """From two thirds of `most` to `most`, evenly and in random order, [count]."""
    lengths = torch.linspace(most * 2 / 3, most, count).round().long()
    return lengths[torch.randperm(count, generator=torch.Generator().manual_seed(0))]


def mask_of(lengths: torch.Tensor, longest: int) -> torch.Tensor:
    """`lengths` [B] -> [B, longest], 1 before each."""
    return (torch.arange(longest)[None, :] < lengths[:, None]).long()


class Everyone:
    """The same weights in every implementation, and one batch, on the settings' device; lengths stay on the CPU."""

    def __init__(self, settings: Settings):
        self.config, device = configuration(settings), settings.device
        torch.manual_seed(0)
        self.first = VlpVseForPreTraining._from_config(self.config, attn_implementation=ATTENTION[0]).to(device)
        draw, count = torch.Generator().manual_seed(1), settings.batch
        most = 9 if settings.small else 36
        self.region_lengths = region_lengths(count, most)
        self.region_mask = mask_of(self.region_lengths, most).to(device)
        features = torch.randn(count, most, self.config.region_size, generator=draw).relu().to(device)
        self.regions = features * self.region_mask.unsqueeze(-1)
        lengths = real_lengths(count, self.config.text_config.max_position_embeddings)
        self.text_lengths = lengths[torch.randperm(count, generator=draw)]
        longest = int(lengths.max())
        self.mask = mask_of(self.text_lengths, longest).to(device)
        ids = torch.randint(FIRST_WORD, self.config.text_config.vocab_size, (count, longest), generator=draw)
        ids[:, 0] = MARK
        self.ids = ids.to(device) * self.mask

    @functools.cache
    def ours(self, attention: str) -> VlpVseForPreTraining:
        if attention == ATTENTION[0]:
            return self.first
        with no_init_weights():
            model = VlpVseForPreTraining._from_config(self.config, attn_implementation=attention)
        model.load_state_dict(parameters_and_buffers(self.first), assign=True)
        return model

    def loss(self, attention: str, dropout: bool) -> torch.Tensor:
        """Of the model in training; without dropout its text tower alone is in evaluation mode."""
        model = self.ours(attention).train()
        model.vse.text_model.train(dropout)
        images = {"region_features": self.regions, "region_mask": self.region_mask}
        return model(input_ids=self.ids, attention_mask=self.mask, **images).loss

    @functools.cached_property
    def weights(self) -> vse_plain.Weights:
        """Under the released names, with gradients to their own parameters."""
        state = revert(self.first.vse.state_dict(), vse_table(self.config))
        state = {name: value.clone() for name, value in state.items()}
        trained = {name for name, value in state.items() if value.is_floating_point() and "running_" not in name}
        return {name: torch.nn.Parameter(value) if name in trained else value for name, value in state.items()}

    def plain_loss(self, weights: vse_plain.Weights, dropout: bool, device: str) -> torch.Tensor:
        regions = self.regions.to(device), self.region_lengths
        words = self.ids.to(device), self.text_lengths
        heads = self.config.text_config.num_attention_heads
        return vse_plain.loss(weights, regions, words, heads, DROPOUT if dropout else 0.0, self.config.margin)

    def flops(self) -> float:
        """Operations of the plain formulation's forward and backward, counted on shapes alone."""
        meta = {
            name: value.detach().to("meta").requires_grad_(value.requires_grad) for name, value in self.weights.items()
        }
        return count_flops(lambda: self.plain_loss(meta, dropout=True, device="meta").backward())


# ---------------------------------------------------------------------------------------------------------------------
# Pooling


def gpo_rows(settings: Settings) -> Iterator[TimedRow]:
    count, most, width = settings.batch, *((9, 16) if settings.small else (36, 1024))
    torch.manual_seed(0)
    ours = GeneralizedPooling().to(settings.device)
    weights = {f"gpool.{name}": torch.nn.Parameter(value.clone()) for name, value in ours.state_dict().items()}
    lengths = region_lengths(count, most)
    mask = mask_of(lengths, most).to(settings.device)
    features = torch.randn(count, most, width, device=settings.device)
    sign = torch.randn(count, width, device=settings.device)  # of the gradient that comes from above

    def pooled_by(name: str) -> torch.Tensor:
        return ours(features, mask)[0] if name == "ours" else vse_plain.pool(features, lengths, weights, "gpool")

    title = f"pooling, {most} x {width}"
    contenders = {name: forward(functools.partial(pooled_by, name)) for name in (BASE, "ours")}
    yield TimedRow(f"{title}, forward", "sets", count, contenders, by_dtype=False)

    features.requires_grad_()

    def trained_by(name: str) -> Contender:
        parameters = [features, *(ours.parameters() if name == "ours" else weights.values())]

        def work(call: Call) -> torch.Tensor:
            pooled = pooled_by(name)
            call.lap("forward")
            gradients = torch.autograd.grad((pooled * sign).sum(), parameters)
            call.lap("backward")
            return torch.cat([one.detach().flatten() for one in (pooled, *gradients)])

        return Contender(work)

    contenders = {name: trained_by(name) for name in (BASE, "ours")}
    yield TimedRow(f"{title}, forward and backward", "sets", count, contenders, by_dtype=False, train=True)


# ---------------------------------------------------------------------------------------------------------------------
# Training step


def step_rows(settings: Settings) -> Iterator[TimedRow]:
    everyone = Everyone(settings)
    groups = parameter_groups(everyone.first, lr=0.0, weight_decay=DECAY, decay="all", lr_factors={"text_model": 0.1})
    ours_update = adamw(groups, betas=(0.9, 0.999), eps=1e-8)
    plain_update = torch.optim.AdamW(
        [one for one in everyone.weights.values() if one.requires_grad], lr=0.0, weight_decay=DECAY
    )
    flops = everyone.flops()

    def contender(loss, update) -> Contender:
        compared = functools.partial(loss, dropout=False)
        return step(functools.partial(loss, dropout=True), update, flops, clip_norm=CLIP_NORM, compared=compared)

    plain = functools.partial(everyone.plain_loss, everyone.weights, device=settings.device)
    contenders = {BASE: contender(plain, plain_update)}
    for kind in ATTENTION:
        contenders[f"ours {kind}"] = contender(functools.partial(everyone.loss, kind), ours_update)
    yield TimedRow(
        f"training step region + BERT, {lengths_of(everyone.mask)}",
        "pairs",
        settings.batch,
        contenders,
        train=True,
        parts={"forward and backward": ("forward", "backward")},
    )


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


def evaluate_rows(settings: Settings) -> Iterator[TimedRow]:
    """Scores of all images with all captions and all ranks, from embeddings. Ranks may differ by one where float32 makes a tie."""
    count, width = (20, 16) if settings.small else (1000, 1024)
    draw = np.random.default_rng(0)

    def unit(rows: np.ndarray) -> np.ndarray:
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)

    images = unit(draw.standard_normal((count, width)))
    texts = np.repeat(images, CAPTIONS, axis=0) + NOISE * unit(draw.standard_normal((count * CAPTIONS, width)))
    texts = unit(texts)
    tensors = torch.from_numpy(images).to(settings.device), torch.from_numpy(texts).to(settings.device)
    ids = torch.arange(count), torch.arange(count).repeat_interleave(CAPTIONS)

    def summary(ranks: tuple) -> torch.Tensor:
        """Of both directions recall at 1, 5 and 10 in percent, and the mean rank."""
        numbers = []
        for one in ranks:
            one = torch.as_tensor(one).double().cpu()
            numbers += [*(100 * (one < k).double().mean() for k in (1, 5, 10)), one.mean()]
        return torch.stack(numbers)

    contenders = {
        BASE: Contender(lambda call: summary(vse_plain.ranks(images, texts, CAPTIONS))),
        "ours": Contender(lambda call: summary(ranks_both_ways(*tensors, *ids)), tolerance=1e-3),
    }
    title = f"evaluation {count:,} x {count * CAPTIONS:,}, scores and ranks"
    yield TimedRow(title, "queries", count * (1 + CAPTIONS), contenders, by_dtype=False)


ROWS = {"store": store_rows, "gpo": gpo_rows, "step": step_rows, "evaluate": evaluate_rows}
