"""One process of CLIP's loss on several ranks. Imports little: every rank starts a new interpreter."""

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.nn.functional import normalize

from hf_vlp.distributed import gather_with_gradient, rank
from hf_vlp.objectives.contrastive import contrastive_loss


def one_rank(number: int, ranks: int, folder: str, features: dict[str, torch.Tensor], logit_scale: float) -> None:
    """Consecutive rows of `image_features` and `text_features` [N, E], raw, against the gathered batch.

    Writes `<number>.safetensors` into `folder`: `loss`, and the gradients `grad.*` of this rank's rows and its scale.
    """
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=number, world_size=ranks)
    own = {name: value.chunk(ranks)[number].clone().requires_grad_() for name, value in features.items()}
    scale = torch.tensor(logit_scale, requires_grad=True)
    images, texts = normalize(own["image_features"], dim=-1), normalize(own["text_features"], dim=-1)
    loss = contrastive_loss(
        images,
        texts,
        scale.exp(),
        all_image_embeds=gather_with_gradient(images),
        all_text_embeds=gather_with_gradient(texts),
        offset=rank() * len(images),
    )
    loss.backward()
    values = {"loss": loss.detach(), "grad.logit_scale": scale.grad}
    values |= {f"grad.{name}": value.grad for name, value in own.items()}
    save_file({name: value.contiguous() for name, value in values.items()}, f"{folder}/{number}.safetensors")
    dist.destroy_process_group()
