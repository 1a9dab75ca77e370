"""ViLT's rows of the benchmark: inference, pre-training step and optimal transport, with random weights of the published size.

Inference: pictures of 384 x 608 pixels, or of the sizes that photographs get by the processor's rule; every text has 40 positions, or
"real lengths" (see `contenders`), padded to the longest of the batch. The released code pads texts to 40 always; transformers' model and
ours get what their processors make. Ours and the plain formulation have weights of their own, which are the same; transformers shares
ours. Dropout is on in the step while time is taken and off while results are compared; transformers has no pre-training loss, its row is
masked words and nothing else.
"""

import functools
from collections.abc import Iterator

import torch
from transformers import ViltForMaskedLM
from transformers.initialization import no_init_weights

from benchmarks import vilt_plain
from benchmarks.contenders import ATTENTION, forward, lengths_of, parameters_and_buffers, real_lengths, step
from benchmarks.measure import BASE, Call, Contender, Settings, TimedRow, count_flops
from conversion.tables import revert
from conversion.vilt_layouts import to_transformers, vilt_table
from hf_vlp import VlpViltConfig, VlpViltForPreTraining
from hf_vlp.objectives.word_patch_alignment import transport_plan
from hf_vlp.training.optim import adamw, parameter_groups

BATCH = 8
STEP_BATCH, TRANSPORT_BATCH = 4, 32
DROPOUT = 0.1
FIRST_WORD = 103  # ids below are marks; 0 pads
PATCHES = [(12, 19), (12, 16), (16, 12), (12, 18), (12, 12), (18, 12), (12, 17), (15, 12)]  # of common photographs, h x w
LARGEST = (12, 19)
WORDS, TRANSPORT_PATCHES = 38, 240


def configuration(settings: Settings) -> VlpViltConfig:
    """The published sizes, or with `settings.small` a few thousand weights."""
    if not settings.small:
        return VlpViltConfig()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return VlpViltConfig(vocab_size=300, image_size=96, patch_size=8, **sizes)


class Everyone:
    """The same weights in every implementation, and batches of texts and pictures, on the settings' device."""

    def __init__(self, settings: Settings, count: int | None = None):
        self.settings, self.config = settings, configuration(settings)
        self.count = settings.batch if count is None else count
        torch.manual_seed(0)
        self.first = VlpViltForPreTraining._from_config(self.config, attn_implementation=ATTENTION[0])
        self.first.to(settings.device)

    @functools.cache
    def ours(self, attention: str) -> VlpViltForPreTraining:
        if attention == ATTENTION[0]:
            return self.first
        with no_init_weights():
            model = VlpViltForPreTraining._from_config(self.config, attn_implementation=attention)
        model.load_state_dict(parameters_and_buffers(self.first), assign=True)
        return model.train(self.first.training)

    @functools.cached_property
    def weights(self) -> vilt_plain.Weights:
        """Under the released names, with gradients to their own parameters."""
        state = revert(self.first.state_dict(), vilt_table(2))
        return {
            name: torch.nn.Parameter(value.clone()) if value.is_floating_point() else value
            for name, value in state.items()
        }

    @functools.cached_property
    def meta(self) -> vilt_plain.Weights:
        """The plain formulation's weights as shapes, to count operations with."""
        return {
            name: value.detach().to("meta").requires_grad_(value.requires_grad) for name, value in self.weights.items()
        }

    def transformers(self, masked_words: bool = False) -> torch.nn.Module:
        """Their model of our weights, with the masked-word head where asked for; its one attention is eager."""
        ours = self.first if masked_words else self.first.vilt
        kind, config, state, _ = to_transformers(self.config, parameters_and_buffers(ours))
        with no_init_weights():
            model = kind._from_config(config, attn_implementation="eager").to(self.settings.device)
        model.load_state_dict(state, assign=True)
        return model.train(self.first.training)

    def words(self, real: bool, seed: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
        """Random ids [B, L], 0 behind each text, and the mask of what is text; L is the longest, or the table's if not `real`."""
        longest = self.config.max_position_embeddings
        lengths = real_lengths(self.count, longest) if real else torch.full((self.count,), longest)
        draw = torch.Generator().manual_seed(seed)
        lengths = lengths[torch.randperm(self.count, generator=draw)]
        mask = (torch.arange(int(lengths.max()))[None, :] < lengths[:, None]).long()
        ids = torch.randint(FIRST_WORD, self.config.vocab_size, mask.shape, generator=draw) * mask
        return ids.to(self.settings.device), mask.to(self.settings.device)

    def pictures(self, mixed: bool, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, list[tuple[int, int]]]:
        """Random pixels [B, 3, H, W], their mask [B, H, W] and the patches of each."""
        sizes = [PATCHES[row % len(PATCHES)] if mixed else LARGEST for row in range(self.count)]
        patch, device = self.config.patch_size, self.settings.device
        height, width = (patch * max(size[axis] for size in sizes) for axis in (0, 1))
        mask = torch.zeros(self.count, height, width, dtype=torch.long)
        for row, (rows, columns) in enumerate(sizes):
            mask[row, : patch * rows, : patch * columns] = 1
        pixels = torch.randn(self.count, 3, height, width, generator=torch.Generator().manual_seed(seed))
        return (pixels * mask.unsqueeze(1)).to(device), mask.to(device), sizes


def padded_to_table(words: tuple[torch.Tensor, torch.Tensor], longest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask [B, L] as the released code has them, always to the table's length."""
    missing = longest - words[0].shape[1]
    return tuple(torch.nn.functional.pad(part, (0, missing)) for part in words)


# ---------------------------------------------------------------------------------------------------------------------
# Inference


def inference_rows(settings: Settings) -> Iterator[TimedRow]:
    everyone = Everyone(settings)
    everyone.first.eval()
    for mixed, real in ((False, False), (True, False), (True, True)):
        yield inference(everyone, mixed, real)


def inference(everyone: Everyone, mixed: bool, real: bool) -> TimedRow:
    """The pooled states of a batch of pairs."""
    heads, longest = everyone.config.num_attention_heads, everyone.config.max_position_embeddings
    words, (pixels, mask, sizes) = everyone.words(real), everyone.pictures(mixed)
    full = padded_to_table(words, longest)

    def plain(weights, words, pixels) -> torch.Tensor:
        return vilt_plain.pooled(vilt_plain.read(weights, words, (pixels, sizes), heads)[0], weights)

    flops = count_flops(lambda: plain(everyone.meta, tuple(part.to("meta") for part in full), pixels.to("meta")))
    contenders = {BASE: forward(lambda: plain(everyone.weights, full, pixels), flops)}
    inputs = {"input_ids": words[0], "attention_mask": words[1], "pixel_values": pixels, "pixel_mask": mask}
    theirs = everyone.transformers()
    contenders["transformers eager"] = forward(lambda: theirs(**inputs).pooler_output, flops)
    for kind in ATTENTION:
        ours = everyone.ours(kind).vilt
        contenders[f"ours {kind}"] = forward(
            lambda model=ours: model.pooled(*words, model.encode_image(pixels, mask)), flops
        )
    shown = "mixed sizes" if mixed else f"{pixels.shape[-2]} x {pixels.shape[-1]}"
    return TimedRow(f"inference, {shown}, {lengths_of(words[1])}", "pairs", everyone.count, contenders)


# ---------------------------------------------------------------------------------------------------------------------
# Pre-training step


class Step:
    """One pre-training batch, and the loss of each implementation on it."""

    def __init__(self, everyone: Everyone, real: bool):
        self.everyone, config = everyone, everyone.config
        self.ids, self.mask = everyone.words(real)
        draw = torch.Generator().manual_seed(3)
        chosen = torch.rand(self.ids.shape, generator=draw).to(self.ids.device) < 0.15
        chosen = chosen & self.mask.bool()
        chosen[:, 1] = True
        self.masked_ids = torch.where(chosen, FIRST_WORD, self.ids)
        self.masked_labels = torch.where(chosen, self.ids, -100)
        self.labels = (torch.arange(everyone.count) % 2).to(self.ids.device)
        self.own, other = everyone.pictures(mixed=real), everyone.pictures(real, seed=5)
        true = self.labels.view(-1, 1, 1) == 1
        self.read = (  # with the text, its own picture or another
            torch.where(true.unsqueeze(1), self.own[0], other[0].flip(0)),
            torch.where(true, self.own[1], other[1].flip(0)),
            [own if label else false for label, own, false in zip(self.labels.tolist(), self.own[2], other[2][::-1])],
        )
        self.longest = config.max_position_embeddings

    def ours(self, model: VlpViltForPreTraining, dropout: bool) -> torch.Tensor:
        model.train(dropout)
        return model(
            input_ids=self.ids,
            attention_mask=self.mask,
            pixel_values=self.own[0],
            pixel_mask=self.own[1],
            mlm_input_ids=self.masked_ids,
            mlm_labels=self.masked_labels,
            itm_pixel_values=self.read[0],
            itm_pixel_mask=self.read[1],
            itm_labels=self.labels,
        ).loss

    def plain(self, weights: vilt_plain.Weights, dropout: bool, device: str | None = None) -> torch.Tensor:
        ids, mask = padded_to_table((self.ids, self.mask), self.longest)
        masked_ids = padded_to_table((self.masked_ids, self.mask), self.longest)[0]
        missing = self.longest - self.masked_labels.shape[1]
        batch = {
            "ids": ids,
            "mask": mask,
            "masked_ids": masked_ids,
            "masked_labels": torch.nn.functional.pad(self.masked_labels, (0, missing), value=-100),
            "pixels": self.own[0],
            "read_pixels": self.read[0],
            "labels": self.labels,
        }
        if device is not None:
            batch = {name: value.to(device) for name, value in batch.items()}
        batch |= {"sizes": self.own[2], "read_sizes": self.read[2]}
        return vilt_plain.pretraining_loss(
            weights, batch, self.everyone.config.num_attention_heads, DROPOUT if dropout else 0.0
        )

    def theirs(self, model: ViltForMaskedLM) -> torch.Tensor:
        output = model(
            input_ids=self.masked_ids,
            attention_mask=self.mask,
            pixel_values=self.own[0],
            pixel_mask=self.own[1],
            labels=self.masked_labels,
        )
        return output.loss


def step_rows(settings: Settings) -> Iterator[TimedRow]:
    everyone = Everyone(settings, min(settings.batch, STEP_BATCH))
    everyone.first.train()
    ours = adamw(parameter_groups(everyone.first, lr=0.0, weight_decay=0.01), betas=(0.9, 0.98), eps=1e-8)
    trained = [weight for weight in everyone.weights.values() if weight.requires_grad]
    plain = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.01, betas=(0.9, 0.98), eps=1e-8)
    for real in (False, True):
        yield training_step(everyone, real, ours, plain)


def training_step(everyone: Everyone, real: bool, ours_update, plain_update) -> TimedRow:
    """Masked words, matching and word-patch alignment, forward, backward and update."""
    batch = Step(everyone, real)
    flops = count_flops(lambda: batch.plain(everyone.meta, False, "meta").backward())
    contenders = {
        BASE: step(
            lambda: batch.plain(everyone.weights, True),
            plain_update,
            flops,
            compared=lambda: batch.plain(everyone.weights, False),
        )
    }
    for kind in ATTENTION:
        ours = everyone.ours(kind)
        contenders[f"ours {kind}"] = step(
            lambda model=ours: batch.ours(model, True),
            ours_update,
            flops,
            compared=lambda model=ours: batch.ours(model, False),
        )
    theirs = everyone.transformers(masked_words=True)
    alone = step(lambda: batch.theirs(theirs), ours_update)
    contenders["transformers, masked words alone"] = Contender(alone.run, tolerance=None)
    shown = "mixed sizes" if real else "one size"
    return TimedRow(
        f"pre-training step, {shown}, {lengths_of(batch.mask)}",
        "pairs",
        everyone.count,
        contenders,
        train=True,
        parts={"forward and backward": ("forward", "backward")},
    )


# ---------------------------------------------------------------------------------------------------------------------
# Optimal transport


def transport_rows(settings: Settings) -> Iterator[TimedRow]:
    count, words, patches = (4, 5, 9) if settings.small else (TRANSPORT_BATCH, WORDS, TRANSPORT_PATCHES)
    draw = torch.Generator().manual_seed(0)
    cost = torch.rand(count, words, patches, generator=draw).to(settings.device)
    used_x, used_y = torch.ones(count, words).to(settings.device), torch.ones(count, patches).to(settings.device)
    used_x[:, -2:], used_y[1::2, -3:] = 0, 0
    cost = cost * used_x.unsqueeze(-1) * used_y.unsqueeze(1)

    def distance(plan: torch.Tensor) -> torch.Tensor:
        return (cost * plan).sum(dim=(1, 2))

    def plain() -> torch.Tensor:
        return distance(vilt_plain.transport(cost, used_x == 0, used_y == 0).transpose(1, 2))

    contenders = {BASE: forward(plain)}
    for solver in ("ipot", "sinkhorn"):
        work = forward(lambda solver=solver: distance(transport_plan(cost, used_x, used_y, solver=solver)))
        # entropic transport is another problem with nearly the same answer
        contenders[f"ours {solver}"] = Contender(work.run, tolerance=1e-4 if solver == "ipot" else 5e-2)
    yield TimedRow(f"optimal transport, {words} x {patches}", "pairs", count, contenders, by_dtype=False)


def encode_once_rows(settings: Settings) -> Iterator[TimedRow]:
    """Scores of one picture with many texts: its part computed once, or with every text as in a plain call of the model."""
    everyone = Everyone(settings)
    everyone.first.eval()
    words, (pixels, _, sizes) = everyone.words(real=True), everyone.pictures(mixed=False)
    full = padded_to_table(words, everyone.config.max_position_embeddings)
    image, heads = (pixels[:1].expand(settings.batch, -1, -1, -1), sizes), everyone.config.num_attention_heads

    def plain() -> torch.Tensor:
        states = vilt_plain.read(everyone.weights, full, image, heads)[0]
        return vilt_plain.linear(vilt_plain.pooled(states, everyone.weights), everyone.weights, "itm_score.fc")[:, 1]

    def ours(call: Call) -> torch.Tensor:
        with call.autocast():
            once = everyone.first.encode_image(pixels[:1])
            rows = {name: value.expand(settings.batch, *value.shape[1:]) for name, value in once.items()}
            return everyone.first.score_pairs(*words, **rows)

    contenders = {BASE: forward(plain), "ours": Contender(ours)}
    yield TimedRow(f"one picture, {lengths_of(words[1])}", "pairs", settings.batch, contenders)


ROWS = {"inference": inference_rows, "step": step_rows, "transport": transport_rows, "scores": encode_once_rows}
