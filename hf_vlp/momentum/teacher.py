"""A teacher whose weights follow those of the model it teaches ("Momentum Contrast", https://arxiv.org/abs/1911.05722, equation 2).

"Align before Fuse" (https://arxiv.org/abs/2107.07651), section 3.3, distils from such a teacher. Its parts are called by the model, under
`torch.no_grad`, in the mode that the model is in: with dropout of its own in training.
"""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from transformers import initialization as init


class MomentumTeacher(nn.Module):
    """Copies of named parts of a model, found as attributes under the same names.

    No parameter of it has a gradient, so optimizers and distributed wrappers pass it over. It is saved with the model.

    A teacher moves once an optimizer step, in the first training forward that finds it `due`; a model does

        if self.training and teacher.due:
            teacher.update(vision=self.vision, ...)

    Args:
        momentum: share of the teacher's own weights that an update keeps.
        students: parts to copy; tensors that they share are shared by the copies.

    Raises:
        ValueError: a momentum out of [0, 1].
    """

    def __init__(self, momentum: float = 0.995, **students: nn.Module):
        super().__init__()
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must be from 0 to 1, got {momentum}; the paper has 0.995")
        self.momentum = momentum
        self._due: bool | None = None  # None: nobody says when a step begins
        for name, part in copy.deepcopy(students).items():
            self.add_module(name, part)
        self.requires_grad_(False)

    def train(self, mode: bool = True) -> "MomentumTeacher":
        """As of any module. Also takes the gradients away again that transformers gives to parameters it loads, before it calls this."""
        return super().train(mode).requires_grad_(False)

    def before_step(self) -> None:
        """Tells that an optimizer step begins."""
        self._due = True

    @property
    def due(self) -> bool:
        """Whether to update now: not again in a step that `before_step` announced; always in a loop that announces none."""
        return self._due is not False

    @torch.no_grad()
    def update(self, **students: nn.Module) -> None:
        """Every parameter becomes momentum * itself + (1 - momentum) * the student's; buffers stay.

        Args:
            students: the parts, under the names of the copies.

        Raises:
            ValueError: parts or parameters that the copies do not have, or the reverse, or of other shapes.
        """
        own, others = zip(*self._pairs(students, nn.Module.named_parameters))
        torch._foreach_lerp_(own, others, 1 - self.momentum)
        if self._due:
            self._due = False

    def copy_(self, **students: nn.Module) -> None:
        """Parameters and buffers become the students', but those that transformers knows to be from a checkpoint.

        For `_init_weights` of the model, called on itself, when its parts have their first values.

        Raises:
            ValueError: see `update`.
        """
        self._take(students, init.copy_)

    @torch.no_grad()
    def become(self, **students: nn.Module) -> None:
        """Parameters and buffers become the students', those from a checkpoint too: for a model that begins anew.

        Raises:
            ValueError: see `update`.
        """
        self._take(students, torch.Tensor.copy_)

    def _take(self, students: dict[str, nn.Module], put: Callable[[torch.Tensor, torch.Tensor], Any]) -> None:
        """Every parameter and buffer, by `put` of the second tensor into the first."""
        for named in (nn.Module.named_parameters, nn.Module.named_buffers):
            for own, other in self._pairs(students, named):
                put(own, other)

    def _pairs(
        self,
        students: dict[str, nn.Module],
        named: Callable[..., Iterable[tuple[str, torch.Tensor]]],
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(a tensor of the teacher, the student's of that name), each of the teacher's once."""
        parts = dict(self.named_children())
        if students.keys() != parts.keys():
            raise ValueError(
                f"the teacher has copies of {', '.join(parts)}, but was given {', '.join(students) or 'nothing'}: give the same parts"
            )
        pairs = {}
        for part, student in students.items():
            own, others = (dict(named(module, remove_duplicate=False)) for module in (parts[part], student))
            shapes = [{name: tensor.shape for name, tensor in side.items()} for side in (own, others)]
            unfit = [name for name in own | others if shapes[0].get(name) != shapes[1].get(name)]
            if unfit:
                raise ValueError(
                    f"{part}: {', '.join(unfit)} of the teacher and of the student do not fit: make the teacher of this very part"
                )
            pairs |= {id(own[name]): (own[name], others[name]) for name in own}
        return list(pairs.values())
