"""Exact fast forms of trained models."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)  # the names are listed in `__init__.pyi`
