from .rewrites import Choice as Choice
from .rewrites import Forms as Forms
