from .. import pets as datasets
from ... import base as base
from ... import decoders as decoders
from ... import encoders as encoders
from ... import losses as losses
from ... import metrics as metrics
from ...decoders.deeplabv3 import DeepLabV3 as DeepLabV3
from ...decoders.deeplabv3plus import DeepLabV3Plus as DeepLabV3Plus
from ...decoders.dpt import DPT as DPT
from ...decoders.fpn import FPN as FPN
from ...decoders.linknet import Linknet as Linknet
from ...decoders.manet import MAnet as MAnet
from ...decoders.pan import PAN as PAN
from ...decoders.pspnet import PSPNet as PSPNet
from ...decoders.segformer import Segformer as Segformer
from ...decoders.unet import Unet as Unet
from ...decoders.unetplusplus import UnetPlusPlus as UnetPlusPlus
from ...decoders.upernet import UPerNet as UPerNet
from ...model.create import MODEL_ARCHITECTURES_MAPPING as MODEL_ARCHITECTURES_MAPPING
from ...model.create import create_model as create_model
from ...model.hub import from_pretrained as from_pretrained
from ..install import install as install
from ..install import installed as installed
from ..install import state_dict as state_dict
from ..install import uninstall as uninstall

__version__: str
