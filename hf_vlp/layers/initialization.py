"""Initial values that several originals take from torch's own layers.

transformers builds every model on the meta device and fills it through `_init_weights`, so values that an original
inherits from torch's constructors have to be written out. All writes go through `transformers.initialization`, which
leaves tensors that came from a checkpoint alone.
"""

import math

from torch import nn
from transformers import initialization as init

from hf_vlp.layers.attention import Attention


def torch_default_(layer: nn.Linear | nn.Conv2d) -> None:
    """Weight uniform in +-1/sqrt(fan in), bias likewise: what `nn.Linear` and `nn.Conv2d` start from."""
    init.kaiming_uniform_(layer.weight, a=math.sqrt(5))
    if layer.bias is not None:
        bound = 1 / math.sqrt(layer.weight[0].numel())
        init.uniform_(layer.bias, -bound, bound)


def multihead_default_(attention: Attention) -> None:
    """What `nn.MultiheadAttention` starts from: Xavier-uniform over the fused [3D, D] input projection, zero biases."""
    bound = math.sqrt(6 / (4 * attention.q_proj.in_features))
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
        init.uniform_(projection.weight, -bound, bound)
        init.zeros_(projection.bias)
    torch_default_(attention.out_proj)
    init.zeros_(attention.out_proj.bias)


class InitializesEveryModule:
    """Mixed into a `PreTrainedModel` in front of it: `_init_weights` sees every module.

    For classes outside its own package transformers takes a module as initialised when all tensors it owns directly are, which
    holds at once for a module that owns none, such as a block or an attention: their rules would never run. That check
    protects weights from code that ignores the flag of loaded tensors; ours writes through `transformers.initialization`, which heeds it.
    """

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        super()._initialize_weights(module, is_custom_code=False)
