"""What the frameworks need before they are imported: no network, a torchvision that loads."""

import importlib
import importlib.util
import os

import torch

# Hugging Face's libraries would ask their hub, and wait where there is no network
os.environ["HF_HUB_OFFLINE"] = "1"

# for models this small more threads only wait for each other
torch.set_num_threads(1)

# PyPI's torchvision for Linux is built for CUDA: beside a CPU build of torch its operators do not
# load, and it cannot be imported, because it decorates two of them by name. No test needs an
# operator of torchvision's, so these two are declared, without an implementation.
if importlib.util.find_spec("torchvision"):
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        LIBRARY = torch.library.Library("torchvision", "DEF")
        for _name in ("nms", "qnms"):
            LIBRARY.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")
