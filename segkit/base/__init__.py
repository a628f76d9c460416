"""The shared pieces under the names that users of segmentation_models_pytorch import: `from segkit.base import modules, SegmentationModel`"""
import importlib

_homes = {
    "SegmentationModel": "segkit.model.model", "SegmentationHead": "segkit.heads.segmentation", "ClassificationHead": "segkit.heads.classification",
    "Conv2dReLU": "segkit.core.layers", "Attention": "segkit.core.layers",
}
_modules = {"modules": "segkit.core.layers", "initialization": "segkit.core.init", "model": "segkit.model.model", "heads": "segkit.heads", "hub_mixin": "segkit.model.hub"}
__all__ = [*_homes, *_modules]


def __getattr__(name):
    if name in _modules: return importlib.import_module(_modules[name])
    if name in _homes: return getattr(importlib.import_module(_homes[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__(): return __all__
