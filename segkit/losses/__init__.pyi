from .base import BINARY_MODE as BINARY_MODE
from .base import MULTICLASS_MODE as MULTICLASS_MODE
from .base import MULTILABEL_MODE as MULTILABEL_MODE
from .base import SegmentationLoss as SegmentationLoss
from .region import DiceLoss as DiceLoss
from .region import FocalTverskyLoss as FocalTverskyLoss
from .region import JaccardLoss as JaccardLoss
from .region import TverskyLoss as TverskyLoss
