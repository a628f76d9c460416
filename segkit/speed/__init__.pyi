from .profiling import Profile as Profile
from .profiling import profile as profile
