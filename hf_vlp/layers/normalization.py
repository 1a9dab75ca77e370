"""Batch normalisation that knows which rows are padding."""

import torch
from torch import nn


class MaskedBatchNorm(nn.BatchNorm1d):
    """Batch normalisation of the elements of padded sets (Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167).

    In training the statistics are of the real elements alone, so that padding changes nothing; without a mask of all of them.
    """

    def forward(self, inputs: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """`inputs` [B, R, D], `mask` [B, R] with 1 at real elements -> [B, R, D]."""
        if mask is None or not self.training:
            return super().forward(inputs.flatten(0, 1)).view_as(inputs)
        rows, weight = inputs.flatten(0, 1), mask.flatten().float().unsqueeze(1)  # [B*R, D], [B*R, 1]
        with torch.autocast(inputs.device.type, enabled=False):
            rows = rows.float()
            count = weight.sum().clamp(min=1)  # without a real row an error follows; the statistics survive it
            mean = (rows * weight).sum(dim=0) / count  # [D]
            variance = ((rows - mean).square() * weight).sum(dim=0) / count
            if self.track_running_stats:
                with torch.no_grad():
                    self.num_batches_tracked.add_(1)
                    self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
                    unbiased = variance * count / (count - 1).clamp(min=1)
                    self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
            scale = self.weight * torch.rsqrt(variance + self.eps)
            return ((rows - mean) * scale + self.bias).to(inputs.dtype).view_as(inputs)


def keep_statistics(module: nn.Module) -> None:
    """Put every batch norm below `module` into evaluation mode: stored statistics are used and stay as they are."""
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.eval()
