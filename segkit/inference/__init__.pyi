from .fold import fold_norms as fold_norms
from .fuse import Fused as Fused
from .fuse import agreement as agreement
from .tiles import tiled as tiled
from .views import View as View
from .views import get_views as get_views
