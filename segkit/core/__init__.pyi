from .layers import Activation as Activation
from .layers import Conv2dReLU as Conv2dReLU
from .layers import get_norm_layer as get_norm_layer
from .registry import Registry as Registry
from .registry import architectures as architectures
from .registry import encoders as encoders
from .task import Task as Task
