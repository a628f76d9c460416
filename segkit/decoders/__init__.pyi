from .unet import Unet as Unet
from .unet import UnetDecoder as UnetDecoder
