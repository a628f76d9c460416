from . import brain as brain
from . import cache as cache
from .brain import brain_card as brain_card
from .brain import brain_dataloaders as brain_dataloaders
from .brain import brain_slices as brain_slices
from .brain import intensity_lookup as intensity_lookup
