from . import core as core
from . import data as data
from . import decoders as decoders
from . import encoders as encoders
from . import heads as heads
from . import learner as learner
from . import losses as losses
from . import metrics as metrics
from . import vis as vis
from .core.create import MODEL_ARCHITECTURES_MAPPING as MODEL_ARCHITECTURES_MAPPING
from .core.create import create_model as create_model
from .core.hub import from_pretrained as from_pretrained
from .core.model import SegmentationModel as SegmentationModel
from .decoders.deeplabv3 import DeepLabV3 as DeepLabV3
from .decoders.deeplabv3plus import DeepLabV3Plus as DeepLabV3Plus
from .decoders.dpt import DPT as DPT
from .decoders.fpn import FPN as FPN
from .decoders.linknet import Linknet as Linknet
from .decoders.manet import MAnet as MAnet
from .decoders.pan import PAN as PAN
from .decoders.pspnet import PSPNet as PSPNet
from .decoders.segformer import Segformer as Segformer
from .decoders.unet import Unet as Unet
from .decoders.unetplusplus import UnetPlusPlus as UnetPlusPlus
from .decoders.upernet import UPerNet as UPerNet
from .learner.learner import segmentation_learner as segmentation_learner

__version__: str
