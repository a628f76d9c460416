from .classification import ClassificationHead as ClassificationHead
from .segmentation import SegmentationHead as SegmentationHead
