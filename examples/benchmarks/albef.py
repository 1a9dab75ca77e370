"""ALBEF's rows of the benchmark: pre-training step and its ablation, re-ranking, answers, pictures and memory, with random weights.

Published sizes. Step: pictures of 256 x 256, a queue of 65,536. Every text has 30 positions, or "real lengths" (see `contenders`), which
the plain formulation pads to 30 always. All contenders share one set of weights, and false pairs are drawn by the same numbers. Dropout is
on while time is taken; while results are compared it is off, and momentum copy and queue rest.

Ablation: from the plain formulation to our model, each line one change on top of those above it.

Re-ranking: a picture of 384 x 384 with many texts, all encoded before time is taken, as in the released code and in our evaluation.
"""

import copy
import functools
from collections.abc import Callable, Iterator

import numpy as np
import torch
from transformers.initialization import no_init_weights

from benchmarks import albef_plain
from benchmarks.clip_inputs import photographs
from benchmarks.contenders import ATTENTION, forward, lengths_of, parameters_and_buffers, real_lengths, step
from benchmarks.measure import BASE, Call, Contender, MemoryRow, Settings, TimedRow, count_flops
from hf_vlp import (
    VlpAlbefConfig,
    VlpAlbefForImageTextRetrieval,
    VlpAlbefForPreTraining,
    VlpAlbefForVisualQuestionAnswering,
    VlpAlbefImageProcessor,
    VlpAlbefImageProcessorPil,
)
from hf_vlp.training.optim import adamw, parameter_groups

BATCH = 4
LONGEST = 30  # tokens of a text
CANDIDATES = 128  # texts of an image, answers to a question
ANSWERS, QUESTION = 3128, 12  # in the published list; tokens of the question
ANSWER_LENGTHS = (
    (3, 0.6),
    (4, 0.3),
    (5, 0.07),
    (6, 0.03),
)  # with start and end, and their shares: most answers are a word
DECAY = 0.02
MARK, MASK, FIRST_WORD = 101, 103, 104  # ids below the first word are marks; 0 pads
EAGER, SDPA = "eager", "sdpa"


def configuration(settings: Settings, image_size: int = 256, **options) -> VlpAlbefConfig:
    """The published sizes, or with `settings.small` a few thousand weights."""
    if not settings.small:
        return VlpAlbefConfig(vision_config={"image_size": image_size}, **options)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return VlpAlbefConfig(
        vision_config={**sizes, "image_size": image_size // 8},
        text_config={**sizes, "vocab_size": 300, "max_position_embeddings": 64},
        multimodal_config=sizes,
        projection_dim=16,
        queue_size=48,
        **options,
    )


def words(config: VlpAlbefConfig, lengths: torch.Tensor, seed: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids [B, L] and their mask: texts of these `lengths` [B] in random order, 0 behind each."""
    draw = torch.Generator().manual_seed(seed)
    lengths = lengths[torch.randperm(len(lengths), generator=draw)]
    mask = (torch.arange(int(lengths.max()))[None, :] < lengths[:, None]).long()
    ids = torch.randint(FIRST_WORD, config.text_config.vocab_size, mask.shape, generator=draw)
    ids[:, 0] = MARK
    return ids * mask, mask


def lengthened(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same batch with its texts padded to `LONGEST`, as the plain formulation has them."""
    filled = {"input_ids": 0, "attention_mask": 0, "mlm_input_ids": 0, "mlm_labels": -100}
    padded = {
        name: torch.nn.functional.pad(batch[name], (0, LONGEST - batch[name].shape[1]), value=value)
        for name, value in filled.items()
    }
    return {**batch, **padded}


class Everyone:
    """The same weights in every implementation, and batches of pairs, on the settings' device."""

    def __init__(self, settings: Settings):
        self.settings, self.config = settings, configuration(settings)
        torch.manual_seed(0)
        self.first = VlpAlbefForPreTraining._from_config(self.config, attn_implementation=EAGER).to(settings.device)

    @functools.cache
    def model(self, attention: str) -> VlpAlbefForPreTraining:
        if attention == EAGER:
            return self.first
        with no_init_weights():
            model = VlpAlbefForPreTraining._from_config(self.config, attn_implementation=attention)
        model.load_state_dict(parameters_and_buffers(self.first), assign=True)
        return model

    def batch(self, real: bool) -> dict[str, torch.Tensor]:
        """What the model's forward takes; texts are as long as the longest, or `LONGEST` if not `real`."""
        count, draw = self.settings.batch, torch.Generator().manual_seed(3)
        lengths = real_lengths(count, LONGEST) if real else torch.full((count,), LONGEST)
        ids, mask = words(self.config, lengths)
        chosen = (torch.rand(ids.shape, generator=draw) < 0.15) & mask.bool()
        chosen[:, 0], chosen[:, 1] = False, True
        side = self.config.vision_config.image_size
        batch = {
            "input_ids": ids,
            "attention_mask": mask,
            "pixel_values": torch.randn(count, 3, side, side, generator=draw),
            "mlm_input_ids": ids.masked_fill(chosen, MASK),
            "mlm_labels": ids.masked_fill(~chosen, -100),
        }
        return {name: value.to(self.settings.device) for name, value in batch.items()}

    @functools.cached_property
    def draws(self) -> torch.Tensor:
        """Of the false pairs, [B, 2]."""
        draw = torch.Generator().manual_seed(4)
        return torch.rand(self.settings.batch, 2, generator=draw).to(self.settings.device)

    def ours(self, attention: str, batch: dict[str, torch.Tensor], train: bool) -> torch.Tensor:
        model = self.model(attention).train(train)
        return model(**batch, negative_draws=self.draws).loss

    def formulated(
        self, way: albef_plain.Formulation, attention: str, batch: dict[str, torch.Tensor], train: bool
    ) -> torch.Tensor:
        model = self.model(attention).train(train)
        return albef_plain.pretraining_loss(model, batch, self.draws, way)

    def plain_update(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self._groups())

    def our_update(self) -> torch.optim.Optimizer:
        return adamw(self._groups(), betas=(0.9, 0.999), eps=1e-8)

    def _groups(self) -> list[dict]:
        return parameter_groups(self.first, lr=0.0, weight_decay=DECAY)


# ---------------------------------------------------------------------------------------------------------------------
# Pre-training step


def contender(loss: Callable[..., torch.Tensor], update: torch.optim.Optimizer, flops: float) -> Contender:
    """`loss`: with `train` True or False."""
    return step(functools.partial(loss, train=True), update, flops, compared=functools.partial(loss, train=False))


def step_rows(settings: Settings) -> Iterator[TimedRow]:
    everyone = Everyone(settings)
    updates = everyone.plain_update(), everyone.our_update()
    for real in (False, True):
        batch = everyone.batch(real)
        plain = functools.partial(everyone.formulated, albef_plain.PLAIN, EAGER, lengthened(batch))
        flops = count_flops(lambda plain=plain: plain(train=False).backward())
        contenders = {BASE: contender(plain, updates[0], flops)}
        for kind in ATTENTION:
            contenders[f"ours {kind}"] = contender(functools.partial(everyone.ours, kind, batch), updates[1], flops)
        yield step_row("pre-training step", batch, contenders)


def step_row(title: str, batch: dict[str, torch.Tensor], contenders: dict[str, Contender]) -> TimedRow:
    return TimedRow(
        f"{title}, {lengths_of(batch['attention_mask'])}",
        "pairs",
        len(batch["input_ids"]),
        contenders,
        train=True,
        parts={"forward and backward": ("forward", "backward")},
    )


def ablation_rows(settings: Settings) -> Iterator[TimedRow]:
    """At real lengths; the last change is the model's own forward, which also reads texts of like length together."""
    everyone = Everyone(settings)
    update, batch = everyone.our_update(), everyone.batch(real=True)
    full, ways = lengthened(batch), albef_plain.formulations()
    plain = functools.partial(everyone.formulated, albef_plain.PLAIN, EAGER, full)
    flops = count_flops(lambda: plain(train=False).backward())
    losses = {"+ AdamW fused": plain}
    losses |= {f"+ {name}": functools.partial(everyone.formulated, way, EAGER, full) for name, way in ways.items()}
    last = list(ways.values())[-1]
    losses |= {
        "+ sdpa": functools.partial(everyone.formulated, last, SDPA, full),
        "+ texts cut to the longest": functools.partial(everyone.formulated, last, SDPA, batch),
        "ours sdpa: + both texts at once": functools.partial(everyone.ours, SDPA, batch),
    }
    contenders = {BASE: contender(plain, everyone.plain_update(), flops)}
    contenders |= {name: contender(loss, update, flops) for name, loss in losses.items()}
    yield step_row("step, one change on top of the other", batch, contenders)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


def same_weights(model: torch.nn.Module) -> torch.nn.Module:
    """The model itself with eager attention, as the plain formulation has it."""
    with no_init_weights():
        eager = type(model)._from_config(copy.deepcopy(model.config), attn_implementation=EAGER)
    eager.load_state_dict(parameters_and_buffers(model), assign=True)
    return eager.eval()


def rerank_rows(settings: Settings) -> Iterator[TimedRow]:
    config = configuration(settings, 384, momentum_teacher=False)
    torch.manual_seed(0)
    ours = VlpAlbefForImageTextRetrieval._from_config(config, attn_implementation=SDPA).to(settings.device).eval()
    eager, count = same_weights(ours), 6 if settings.small else CANDIDATES
    vision = config.vision_config
    image = torch.randn(1, 1 + (vision.image_size // vision.patch_size) ** 2, vision.hidden_size).to(settings.device)
    for real in (False, True):
        lengths = real_lengths(count, LONGEST) if real else torch.full((count,), LONGEST)
        ids, mask = (part.to(settings.device) for part in words(config, lengths))
        ids_full, mask_full = (torch.nn.functional.pad(part, (0, LONGEST - ids.shape[1])) for part in (ids, mask))
        with torch.inference_mode():
            full = eager.albef.text_model(ids_full, mask_full).last_hidden_state
            text = ours.encode_text(ids, mask)

        def plain(full=full, mask=mask_full) -> torch.Tensor:
            return albef_plain.rerank(eager, full, mask, image)

        def score(text=text) -> torch.Tensor:
            return ours.score_pairs(**text, key_values=ours.keys_and_values(image))

        with torch.inference_mode():
            flops = count_flops(plain)
        contenders = {BASE: forward(plain, flops), "ours": forward(score, flops)}
        yield TimedRow(f"re-ranking of {count}, {lengths_of(mask)}", "pairs", count, contenders)


def answer_list(config: VlpAlbefConfig, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` random answers [K, La] of the lengths in `ANSWER_LENGTHS`, no two with the same first word, and their mask."""
    longest = max(length for length, _ in ANSWER_LENGTHS)
    lengths = torch.full((count,), longest)
    start = 0
    for length, share in ANSWER_LENGTHS:
        stop = start + round(share * count)
        lengths[start:stop] = length
        start = stop
    ids, mask = words(config, lengths, seed=5)
    draw = torch.Generator().manual_seed(6)
    first = torch.randperm(config.text_config.vocab_size - FIRST_WORD, generator=draw)[:count]
    ids[:, 1] = FIRST_WORD + first  # answers that share it would tie, and which of them is chosen would be chance
    return ids, mask


def answer_rows(settings: Settings) -> Iterator[TimedRow]:
    """A question, read with its image, and the list of answers."""
    total, k = (40, 6) if settings.small else (ANSWERS, CANDIDATES)
    config = configuration(settings, momentum_teacher=False, num_labels=total)
    torch.manual_seed(0)
    ours = VlpAlbefForVisualQuestionAnswering._from_config(config, attn_implementation=SDPA).to(settings.device).eval()
    eager = same_weights(ours)
    states = torch.randn(1, QUESTION, config.multimodal_config.hidden_size).to(settings.device)
    mask = torch.ones(1, QUESTION, dtype=torch.long, device=settings.device)
    answers = tuple(part.to(settings.device) for part in answer_list(config, total))

    def plain() -> torch.Tensor:
        return albef_plain.rank_answers(eager, states, mask, answers, k)[1]

    with torch.inference_mode():
        flops = count_flops(plain)
    contenders = {
        BASE: forward(plain, flops),
        "ours": forward(lambda: ours.rank_answers(states, mask, *answers, k)[1], flops),
    }
    yield TimedRow(f"{k} of {total:,} answers ranked", "questions", 1, contenders)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures and memory


def transform_rows(settings: Settings) -> Iterator[TimedRow]:
    pictures = photographs(2 if settings.small else 32)
    tensors = [torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous() for picture in pictures]
    exact, fast = VlpAlbefImageProcessorPil(), VlpAlbefImageProcessor()
    grey_levels = 3 / 255 / min(albef_plain.STD)  # antialiased resizing of 8-bit tensors rounds otherwise than Pillow

    def work(call: Call, processor, pictures) -> torch.Tensor:
        return processor(pictures, return_tensors="pt").pixel_values

    contenders = {
        BASE: Contender(lambda call: torch.stack([albef_plain.transform(picture, 256) for picture in pictures])),
        "ours exact": Contender(functools.partial(work, processor=exact, pictures=pictures), tolerance=grey_levels),
        "ours tensor": Contender(functools.partial(work, processor=fast, pictures=pictures), tolerance=grey_levels),
        "ours tensor, given tensors": Contender(
            functools.partial(work, processor=fast, pictures=tensors), tolerance=grey_levels
        ),
    }
    yield TimedRow("transforms, 640 x 480", "pictures", len(pictures), contenders, by_dtype=False)


def memory_rows(settings: Settings) -> Iterator[MemoryRow]:
    for batch in (2,) if settings.small else (4, 8):
        names = (BASE, "ours sdpa", "ours sdpa, real lengths")
        yield MemoryRow(f"peak memory of two steps, B {batch}", "albef", batch, names[:2] if settings.small else names)


def step_alone(name: str, settings: Settings) -> Callable[[Call], None]:
    """The training step of one contender of `memory_rows`."""
    everyone = Everyone(settings)
    batch = everyone.batch("real" in name)
    if name == BASE:
        loss = functools.partial(everyone.formulated, albef_plain.PLAIN, EAGER, batch, train=True)
        return step(loss, everyone.plain_update()).run
    return step(functools.partial(everyone.ours, SDPA, batch, train=True), everyone.our_update()).run


ROWS = {
    "step": step_rows,
    "ablation": ablation_rows,
    "rerank": rerank_rows,
    "answers": answer_rows,
    "transforms": transform_rows,
    "memory": memory_rows,
}
