from . import core as core
from . import data as data
from . import decoders as decoders
from . import encoders as encoders
from . import heads as heads
from . import learner as learner
from . import losses as losses
from . import metrics as metrics
from . import vis as vis
from .core.model import SegmentationModel as SegmentationModel
from .decoders.unet import Unet as Unet

__version__: str
