"""CLIP's rows of the benchmark: towers, training step, transforms, tokenizer and memory, with random weights.

Published sizes: ViT-B/32 with its text tower, RN50. Everyone gets the same weights: ours and transformers share one set of parameters,
the plain formulation and open_clip (if installed) a second one, which is the first in the released layout.

Captions. "77 positions": every caption fills the table. "real lengths": see `contenders`. There the original and open_clip compute all
77 positions, as their code demands; ours and transformers get what their processors make, texts padded to the longest of the batch.
"""

import functools
from collections.abc import Callable, Iterator

import torch
from accelerate import Accelerator
from transformers import CLIPModel
from transformers.initialization import no_init_weights

from benchmarks import clip_plain
from benchmarks.clip_inputs import OPEN_CLIP, tokenizer_rows, transform_rows
from benchmarks.contenders import ATTENTION, forward, lengths_of, parameters_and_buffers, real_lengths, step
from benchmarks.measure import BASE, Call, MemoryRow, Settings, TimedRow, count_flops
from conversion.to_original import to_state_dict, to_transformers
from hf_vlp import (
    VlpClipConfig,
    VlpClipForPreTraining,
    VlpClipResNetConfig,
    VlpClipTextConfig,
    VlpClipVisionConfig,
)
from hf_vlp.training.optim import adamw, parameter_groups
from hf_vlp.training.steps import cached_contrastive_step

BATCH = 16  # unless given


def configuration(settings: Settings, tower: str = "vit") -> VlpClipConfig:
    """The published sizes, or with `settings.small` a few thousand weights."""
    text, vision, resnet = {}, {}, {}
    if settings.small:
        text = {"vocab_size": 600, "bos_token_id": 598, "eos_token_id": 599, "pad_token_id": 599}
        sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 1}
        text, vision = text | sizes, {**sizes, "image_size": 64, "patch_size": 16}
        resnet = {"width": 8, "layers": [1, 1, 1, 1], "num_attention_heads": 4, "image_size": 64, "projection_dim": 32}
    if tower == "resnet":
        image = VlpClipResNetConfig(**resnet)
        words = VlpClipTextConfig(**text)
        return VlpClipConfig(text_config=words, vision_config=image, projection_dim=image.projection_dim)
    return VlpClipConfig(
        text_config=VlpClipTextConfig(**text),
        vision_config=VlpClipVisionConfig(**vision),
        projection_dim=32 if settings.small else 512,
    )


def heads_of(config: VlpClipConfig) -> tuple[int, int]:
    """Attention heads of the image and of the text tower."""
    return config.vision_config.num_attention_heads, config.text_config.num_attention_heads


class Everyone:
    """The same weights in every implementation, each built when first asked for."""

    def __init__(self, settings: Settings, tower: str = "vit"):
        self.settings = settings
        self.config = configuration(settings, tower)
        self.heads = heads_of(self.config)
        torch.manual_seed(0)
        self.first = VlpClipForPreTraining._from_config(self.config, attn_implementation=ATTENTION[0])
        for name, parameter in self.first.named_parameters():
            if name.endswith("bn3.weight"):  # at zero the blocks would add nothing, and a fault in them would not show
                torch.nn.init.uniform_(parameter, 0.5, 1.0)
        self.first.to(settings.device)

    @functools.cache
    def ours(self, attention: str) -> VlpClipForPreTraining:
        if attention == ATTENTION[0]:
            return self.first
        with no_init_weights():
            model = VlpClipForPreTraining._from_config(self.config, attn_implementation=attention)
        model.load_state_dict(parameters_and_buffers(self.first), assign=True)
        return model.train(self.first.training)

    @functools.cache
    def transformers(self, attention: str) -> CLIPModel:
        config, state = to_transformers(self.config, parameters_and_buffers(self.first.clip))
        with no_init_weights():
            model = CLIPModel._from_config(config, attn_implementation=attention).to(self.settings.device)
        model.load_state_dict(state, assign=True)
        return model.train(self.first.training)

    @functools.cached_property
    def weights(self) -> clip_plain.Weights:
        """The released layout, with gradients to their own parameters."""
        state = to_state_dict(self.config, self.first.clip.state_dict(), "open_clip")
        return {
            name: torch.nn.Parameter(value.clone()) if value.is_floating_point() and "running_" not in name else value
            for name, value in state.items()
        }

    @functools.cached_property
    def open_clip(self) -> torch.nn.Module:
        from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

        image, text = self.config.vision_config, self.config.text_config
        if isinstance(image, VlpClipResNetConfig):
            sizes = {"layers": image.layers, "width": image.width}
        else:
            sizes = {"layers": image.num_hidden_layers, "width": image.hidden_size, "patch_size": image.patch_size}
        vision = CLIPVisionCfg(
            **sizes, head_width=image.hidden_size // image.num_attention_heads, image_size=image.image_size
        )
        words = CLIPTextCfg(
            context_length=text.max_position_embeddings,
            vocab_size=text.vocab_size,
            width=text.hidden_size,
            heads=text.num_attention_heads,
            layers=text.num_hidden_layers,
        )
        model = CLIP(self.config.projection_dim, vision, words, quick_gelu=True).to(self.settings.device)
        left = model.load_state_dict(self.weights, assign=True, strict=False)
        assert not left.unexpected_keys and all("num_batches_tracked" in name for name in left.missing_keys), left
        return model.train(self.first.training)

    def pictures(self) -> torch.Tensor:
        """Random pixels [B, 3, R, R]."""
        size = self.config.vision_config.image_size
        draw = torch.Generator().manual_seed(1)
        return torch.randn(self.settings.batch, 3, size, size, generator=draw).to(self.settings.device)

    def captions(self, real: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Random ids [B, 77], after their end filled with end-of-text, and the mask of what is text."""
        config, count = self.config.text_config, self.settings.batch
        longest = config.max_position_embeddings
        lengths = torch.full((count,), longest)
        if real:
            lengths = real_lengths(count, longest)
        draw = torch.Generator().manual_seed(2)
        ids = torch.randint(0, config.bos_token_id, (count, longest), generator=draw)
        ids[:, 0] = config.bos_token_id
        places = torch.arange(longest)[None, :]
        ids = torch.where(places < lengths[:, None] - 1, ids, config.eos_token_id)
        mask = (places < lengths[:, None]).long()
        return ids.to(self.settings.device), mask.to(self.settings.device)

    @functools.cached_property
    def meta(self) -> clip_plain.Weights:
        """The plain formulation's weights as shapes, to count operations with."""
        return {
            name: value.detach().to("meta").requires_grad_(value.requires_grad) for name, value in self.weights.items()
        }


def cut(ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts padded to the longest of the batch only."""
    longest = int(mask.sum(dim=1).max())
    return ids[:, :longest].contiguous(), mask[:, :longest].contiguous()


# ---------------------------------------------------------------------------------------------------------------------
# Towers


def image_rows(settings: Settings) -> Iterator[TimedRow]:
    everyone = Everyone(settings)
    everyone.first.eval()
    pixels = everyone.pictures()
    flops = count_flops(lambda: clip_plain.encode_image(everyone.meta, pixels.to("meta"), everyone.heads[0]))
    contenders = {BASE: forward(lambda: clip_plain.encode_image(everyone.weights, pixels, everyone.heads[0]), flops)}
    if OPEN_CLIP:
        contenders["open_clip"] = forward(lambda: everyone.open_clip.encode_image(pixels), flops)
    for kind in ATTENTION:
        theirs, ours = everyone.transformers(kind), everyone.ours(kind).clip
        contenders[f"transformers {kind}"] = forward(
            lambda model=theirs: model.get_image_features(pixels).pooler_output, flops
        )
        contenders[f"ours {kind}"] = forward(lambda model=ours: model.encode_image(pixels), flops)
    yield TimedRow("image tower ViT-B/32", "pictures", settings.batch, contenders)


def text_rows(settings: Settings) -> Iterator[TimedRow]:
    everyone = Everyone(settings)
    everyone.first.eval()
    for real in (False, True):
        full, short = everyone.captions(real), cut(*everyone.captions(real))
        full_flops, flops = (
            count_flops(lambda ids=ids: clip_plain.encode_text(everyone.meta, ids.to("meta"), everyone.heads[1]))
            for ids, _ in (full, short)
        )
        contenders = {
            BASE: forward(
                lambda ids=full[0]: clip_plain.encode_text(everyone.weights, ids, everyone.heads[1]), full_flops
            )
        }
        if OPEN_CLIP:
            contenders["open_clip"] = forward(lambda ids=full[0]: everyone.open_clip.encode_text(ids), full_flops)
        for kind in ATTENTION:
            theirs, ours = everyone.transformers(kind), everyone.ours(kind).clip
            contenders[f"transformers {kind}"] = forward(
                lambda model=theirs, text=short: model.get_text_features(*text).pooler_output, flops
            )
            contenders[f"ours {kind}"] = forward(lambda model=ours, text=short: model.encode_text(*text), flops)
        yield TimedRow(f"text tower, {lengths_of(full[1])}", "captions", settings.batch, contenders)


def rn50_rows(settings: Settings) -> Iterator[TimedRow]:
    everyone = Everyone(settings, "resnet")
    everyone.first.eval()
    pixels = everyone.pictures()
    flops = count_flops(lambda: clip_plain.encode_image_resnet(everyone.meta, pixels.to("meta"), everyone.heads[0]))
    work = {
        BASE: lambda: clip_plain.encode_image_resnet(everyone.weights, pixels, everyone.heads[0]),
        "ours": lambda: everyone.first.clip.encode_image(pixels),
    }
    if OPEN_CLIP:
        last = pixels.contiguous(memory_format=torch.channels_last)
        work["open_clip"] = lambda: everyone.open_clip.encode_image(pixels)
        work["open_clip channels_last"] = lambda: everyone.open_clip.encode_image(last)
    contenders = {name: forward(one, flops) for name, one in work.items()}
    yield TimedRow("image tower RN50", "pictures", settings.batch, contenders)


# ---------------------------------------------------------------------------------------------------------------------
# Training step


def optimizer_of(implementation: str, parameters) -> torch.optim.Optimizer:
    """AdamW as each one's own training code makes it: ours and transformers' Trainer fused, open_clip's torch's default."""
    if implementation == "ours":
        return adamw(parameter_groups(parameters, lr=0.0, weight_decay=0.2), betas=(0.9, 0.98), eps=1e-6)
    fused = {"fused": True} if implementation == "transformers" else {}
    return torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.2, betas=(0.9, 0.98), eps=1e-6, **fused)


def open_clip_loss(model, pixels: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    from open_clip import ClipLoss

    images, texts, scale = model(pixels, ids)
    return ClipLoss()(images, texts, scale)


def step_rows(settings: Settings) -> Iterator[TimedRow]:
    everyone = Everyone(settings)
    everyone.first.train()
    pixels = everyone.pictures()
    ours_update = optimizer_of("ours", everyone.first)  # of the shared parameters, so transformers' as well
    plain_update = optimizer_of(BASE, [p for p in everyone.weights.values() if p.requires_grad])
    for real in (False, True):
        full, short = everyone.captions(real), cut(*everyone.captions(real))

        def plain_loss(weights, pixels, ids):
            return clip_plain.loss(weights, pixels, ids, everyone.heads)

        full_flops, flops = (
            count_flops(lambda ids=ids: plain_loss(everyone.meta, pixels.to("meta"), ids.to("meta")).backward())
            for ids, _ in (full, short)
        )
        contenders = {
            BASE: step(lambda ids=full[0]: plain_loss(everyone.weights, pixels, ids), plain_update, full_flops)
        }
        if OPEN_CLIP:
            contenders["open_clip"] = step(
                lambda ids=full[0]: open_clip_loss(everyone.open_clip, pixels, ids), plain_update, full_flops
            )
        for kind in ATTENTION:
            theirs, ours = everyone.transformers(kind), everyone.ours(kind)
            contenders[f"transformers {kind}"] = step(
                lambda model=theirs, text=short: model(text[0], pixels, text[1], return_loss=True).loss,
                ours_update,
                flops,
            )
            contenders[f"ours {kind}"] = step(
                lambda model=ours, text=short: model(text[0], pixels, text[1]).loss, ours_update, flops, ours.after_step
            )
        yield TimedRow(
            f"training step ViT-B/32, {lengths_of(full[1])}",
            "pairs",
            settings.batch,
            contenders,
            train=True,
            parts={"forward and backward": ("forward", "backward")},
        )


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def memory_rows(settings: Settings) -> Iterator[MemoryRow]:
    for batch in (2,) if settings.small else (16, 32):
        names = [BASE, "transformers", "ours", "ours real lengths", f"ours in chunks of {max(1, batch // 4)}"]
        if settings.small:
            names = [BASE, names[-1]]
        elif OPEN_CLIP:
            names.insert(1, "open_clip")
        yield MemoryRow(f"peak memory of two steps, B {batch}", "clip", batch, tuple(names))


def step_alone(name: str, settings: Settings) -> Callable[[Call], None]:
    """The training step of one contender of `memory_rows`, without the weights of any other."""
    everyone = Everyone(settings)
    everyone.first.train()
    pixels, (ids, mask) = everyone.pictures(), everyone.captions("real" in name)
    if name in (BASE, "open_clip"):
        weights, config = everyone.weights, everyone.config
        model = everyone.open_clip if name == "open_clip" else None
        del everyone.first
        update = optimizer_of(name, [weight for weight in weights.values() if weight.requires_grad])
        if model is not None:
            return step(lambda: open_clip_loss(model, pixels, ids), update).run
        return step(lambda: clip_plain.loss(weights, pixels, ids, heads_of(config)), update).run
    ids, mask = cut(ids, mask)
    if name == "transformers":
        model = everyone.transformers(ATTENTION[0])
        del everyone.first
        update = optimizer_of(name, model.parameters())
        return step(lambda: model(ids, pixels, mask, return_loss=True).loss, update).run
    model = everyone.first
    update = optimizer_of("ours", model)
    if "chunks" not in name:
        return step(lambda: model(ids, pixels, mask).loss, update).run
    chunk = int(name.rpartition(" ")[2])
    batch = {"input_ids": ids, "pixel_values": pixels, "attention_mask": mask}

    def run(call: Call) -> None:
        mixed = {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}[call.dtype]
        accelerator = Accelerator(cpu=settings.device == "cpu", mixed_precision=mixed)
        update.zero_grad()
        cached_contrastive_step(accelerator, model, [batch], chunk_size=chunk)
        update.step()

    return run


ROWS: dict[str, Callable[[Settings], Iterator[TimedRow | MemoryRow]]] = {
    "image": image_rows,
    "text": text_rows,
    "step": step_rows,
    "rn50": rn50_rows,
    "transforms": transform_rows,
    "tokenizer": tokenizer_rows,
    "memory": memory_rows,
}
