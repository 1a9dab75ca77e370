"""A two-tower model of a few dozen weights, its pairs, and the parts of a run around them."""

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn
from transformers.utils import ModelOutput

from hf_vlp.distributed import gather_with_gradient, gather_without_gradient, rank
from hf_vlp.objectives.contrastive import contrastive_loss
from hf_vlp.training.optim import adamw, parameter_groups, schedule
from hf_vlp.training.state import Progress
from hf_vlp.training.stream import BatchStream


@dataclass
class ToyOutput(ModelOutput):
    loss: torch.Tensor | None = None
    losses: dict | None = None


class ToyTwoTower(nn.Module):
    """Linear towers of 12 pixels and 10 tokens; the verbs that the training room asks of a model."""

    def __init__(self, dropout: float = 0.0, batch_norm: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.vision_model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.GELU(), nn.Dropout(dropout))
        self.text_model = nn.Sequential(nn.EmbeddingBag(10, 8), nn.LayerNorm(8), nn.Dropout(dropout))
        self.norm = nn.BatchNorm1d(8) if batch_norm else nn.Identity()
        self.visual_projection = nn.Linear(8, 6, bias=False)
        self.text_projection = nn.Linear(8, 6, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(1.0))
        self.steps_seen = 0

    def embed(self, pixel_values, input_ids):
        images = self.visual_projection(self.norm(self.vision_model(pixel_values)))
        texts = self.text_projection(self.text_model(input_ids))
        return nn.functional.normalize(images, dim=-1), nn.functional.normalize(texts, dim=-1)

    def objective(self, image_embeds, text_embeds, image_ids=None):
        loss = contrastive_loss(
            image_embeds,
            text_embeds,
            self.logit_scale.exp(),
            all_image_embeds=gather_with_gradient(image_embeds),
            all_text_embeds=gather_with_gradient(text_embeds),
            image_ids=image_ids,
            all_image_ids=None if image_ids is None else gather_without_gradient(image_ids),
            offset=rank() * len(image_embeds),
        )
        return loss, {"itc": loss}

    def forward(self, pixel_values, input_ids, image_ids=None):
        loss, losses = self.objective(*self.embed(pixel_values, input_ids), image_ids)
        return ToyOutput(loss=loss, losses=losses)

    def after_step(self):
        self.steps_seen += 1
        with torch.no_grad():
            self.logit_scale.clamp_(max=2.0)


class ToyPairs(torch.utils.data.Dataset):
    """`count` fixed pairs; the index is also the identity of the image."""

    def __init__(self, count: int = 32):
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(count, 3, 2, 2, generator=generator)
        self.texts = torch.randint(0, 10, (count, 4), generator=generator)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"pixel_values": self.images[index], "input_ids": self.texts[index], "image_ids": torch.tensor(index)}


class ToySampler:
    """Shuffled batches of an epoch, a pure function of (seed, epoch)."""

    def __init__(self, count: int, batch_size: int):
        self.count, self.batch_size, self.epoch, self.start = count, batch_size, 0, 0

    def set_epoch(self, epoch):
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def state_dict(self, position):
        return {"epoch": self.epoch, "position": position, "count": self.count}

    def load_state_dict(self, state):
        if state["count"] != self.count:
            raise ValueError(f"count={state['count']} saved, {self.count} here")
        self.epoch, self.start = state["epoch"], state["position"]

    def __len__(self):
        return self.count // self.batch_size

    def __iter__(self):
        order = torch.randperm(self.count, generator=torch.Generator().manual_seed(100 + self.epoch)).tolist()
        begin, self.start = self.start * self.batch_size, 0
        for start in range(begin, self.count - self.batch_size + 1, self.batch_size):
            yield order[start : start + self.batch_size]


def batch(count: int = 8, start: int = 0) -> dict[str, torch.Tensor]:
    pairs = ToyPairs()
    return torch.utils.data.default_collate([pairs[index] for index in range(start, start + count)])


def parts(accelerator: Accelerator, model: nn.Module, *, total_steps: int = 20, lr: float = 1e-2, batch_size: int = 8):
    """Prepared model, prepared optimizer, schedule and a stream with its progress."""
    optimizer = adamw(parameter_groups(model, lr, 0.1), betas=(0.9, 0.98), eps=1e-6)
    scheduler = schedule(optimizer, name="cosine", total_steps=total_steps, warmup_steps=2)
    model, optimizer = accelerator.prepare(model, optimizer)
    return model, optimizer, scheduler


def stream(accelerator: Accelerator, progress: Progress, batch_size: int = 8) -> BatchStream:
    return BatchStream(
        ToyPairs(32),
        ToySampler(32, batch_size),
        torch.utils.data.default_collate,
        rank=accelerator.process_index,
        processes=accelerator.num_processes,
        device=accelerator.device,
        progress=progress,
    )
