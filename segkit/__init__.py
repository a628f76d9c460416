"""Literate semantic segmentation: any backbone, any decoder, masks and image labels in one fastai Learner."""

__version__ = "0.1.0"

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)  # the names are listed in `__init__.pyi`
__all__ += ["__version__"]
