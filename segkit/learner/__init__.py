"""Masks and image labels in one fastai `Learner`."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)  # names: `__init__.pyi`
