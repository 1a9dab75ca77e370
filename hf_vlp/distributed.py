"""The few facts and verbs of a run on several processes, each the identity on one process.

Convention of the gathered losses: every process scores its own rows and columns against the batch of all processes,
and the mean over processes of those losses is the loss of the whole batch. The backward of the gather SUMS over
processes what each wants from a row, DistributedDataParallel then takes the MEAN over processes of the parameter
gradients, so N processes with B pairs each take the very step of one process with N * B pairs.
"""

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist


def world_size() -> int:
    """Number of processes of this run; 1 outside `torch.distributed`."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Index of this process, from 0; 0 outside `torch.distributed`."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


class _GatherWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        ctx.rows = x.shape[0]
        return _gather(x)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        # all-reduce and slice, not reduce-scatter: gloo has no reduce-scatter
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, op=dist.ReduceOp.SUM)
        start = dist.get_rank() * ctx.rows
        return grad[start : start + ctx.rows]


def _gather(x: torch.Tensor) -> torch.Tensor:
    x = x.detach().contiguous()
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x)
    return torch.cat(parts, dim=0)


def gather_with_gradient(x: torch.Tensor) -> torch.Tensor:
    """The rows of all processes, in the order of their ranks, with gradient to every process's rows.

    Args:
        x: [B, ...], the same shape on every process. Not checked: comparing the sizes would make every step wait for one more
            exchange, so a loader must drop its last, smaller batch.

    Returns:
        [N * B, ...] for N processes; `x` itself on one process.
    """
    return x if world_size() == 1 else _GatherWithGradient.apply(x)


def gather_without_gradient(x: torch.Tensor) -> torch.Tensor:
    """The rows of all processes, in the order of their ranks, cut from the graph.

    Args:
        x: [B, ...], the same shape on every process.

    Returns:
        [N * B, ...] for N processes; `x` without its graph on one process.
    """
    return x.detach() if world_size() == 1 else _gather(x)


def share_buffers(module: torch.nn.Module) -> None:
    """Gives every process the first one's buffers, such as the running statistics of batch norms.

    DistributedDataParallel does so at the start of its forward only: after a step, and in a forward beside it, each
    process would go by statistics of its own pairs, while a checkpoint has the first one's. Called by all processes.
    """
    if world_size() == 1:
        return
    _exchange(list(module.buffers()), lambda flat: dist.broadcast(flat, src=0))


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Mean over processes of every `.grad`, for a backward that ran outside DistributedDataParallel.

    A parameter whose gradient is None must have none on every process.
    """
    if world_size() == 1:
        return

    def mean(flat: torch.Tensor) -> None:
        dist.all_reduce(flat, op=dist.ReduceOp.SUM)
        flat.div_(world_size())

    _exchange([parameter.grad for parameter in parameters if parameter.grad is not None], mean)


@torch.no_grad()
def _exchange(tensors: list[torch.Tensor], operation: Callable[[torch.Tensor], None]) -> None:
    """Applies an operation among processes in place, once for all tensors of a dtype instead of once a tensor."""
    for dtype in {tensor.dtype: None for tensor in tensors}:
        same = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in same])
        operation(flat)
        for tensor, part in zip(same, flat.split([one.numel() for one in same]), strict=True):
            tensor.copy_(part.view(tensor.shape))
