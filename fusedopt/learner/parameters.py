"""Which parameters of a model are which."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)


def params(model: nn.Module) -> list[torch.nn.Parameter]:
    """All of them."""
    return list(model.parameters())


def trainable_params(model: nn.Module) -> list[torch.nn.Parameter]:
    """Those that want a gradient."""
    return [p for p in model.parameters() if p.requires_grad]


def norm_bias_params(model: nn.Module, with_bias: bool = True) -> Iterator[torch.nn.Parameter]:
    """Those of normalization layers, and with ``with_bias`` the biases of other layers too."""
    for module in model.modules():
        if isinstance(module, NORMS):
            yield from module.parameters(recurse=False)
        elif with_bias and isinstance(bias := getattr(module, "bias", None), nn.Parameter):
            yield bias
