"""Other libraries' names: SMP's module tree, `segkit.compat.smp`; nothing in segkit imports it."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
