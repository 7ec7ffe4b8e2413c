"""Import this before what imports torchvision (timm, fastai.vision, Lightning) where torch is one for CPUs only.

Its compiled operators do not load there, and its import fails unless they are declared. Nothing here calls them.
"""

import torch

try:
    import torchvision  # noqa: F401
except ImportError:
    pass
except RuntimeError:  # operator torchvision::nms does not exist
    library = torch.library.Library("torchvision", "FRAGMENT")  # as long as this lives, so do its operators
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
