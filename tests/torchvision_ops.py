"""Import this before fastai.vision: torchvision's compiled operators, which a CPU-only torch comes without.

Declaring them is enough for torchvision to be imported. Nothing here calls them.
"""

import torch

_library = torch.library.Library("torchvision", "DEF")  # as long as this lives, so do the declarations
for _name in ("nms", "qnms"):
    if not hasattr(torch.ops.torchvision, _name):
        _library.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
