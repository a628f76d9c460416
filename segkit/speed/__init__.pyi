from .fuse import Choices as Choices
from .fuse import Fused as Fused
from .fuse import agreement as agreement
from .profiling import Profile as Profile
from .profiling import profile as profile
from .rewrites import Choice as Choice
from .rewrites import Forms as Forms
from .rewrites import Rewrites as Rewrites
