"""The module tree of segmentation_models_pytorch 0.6, made of segkit: `import segkit.compat.smp as smp`"""

from ..install import install as install
from ..install import installed as installed
from ..install import state_dict as state_dict
from ..install import uninstall as uninstall
from ..tree import make_top

make_top(__name__)
__all__ += ["install", "installed", "state_dict", "uninstall"]  # noqa: F821, PLE0604
