"""Makes torchvision and torchaudio from PyPI importable beside a CPU build of torch.

Put this folder on PYTHONPATH.

Both wheels are CUDA builds, whose compiled parts cannot load there. torchvision then only misses
two operator names that it wants to describe; torchaudio only misses a module that says "no
extension". Both are supplied, when one of the two is first imported; no installed file is touched,
and with a CUDA build of torch nothing happens at all.
"""

import importlib.abc
import sys
import types

_libraries = []  # an operator library lives as long as its object


class _Supply(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in ("torchvision", "torchaudio"):
            sys.meta_path.remove(self)
            _supply()
        return None


def _supply():
    import torch

    if torch.version.cuda is not None or torch.version.hip is not None:
        return
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _libraries.append(library)
    extension = types.ModuleType("torchaudio._extension")
    vars(extension).update(
        _IS_TORCHAUDIO_EXT_AVAILABLE=False,
        _IS_ALIGN_AVAILABLE=False,
        _check_cuda_version=lambda: None,
        fail_if_no_align=lambda function: function,
    )
    sys.modules["torchaudio._extension"] = extension


sys.meta_path.insert(0, _Supply())
