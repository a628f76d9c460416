from .create import MODEL_ARCHITECTURES_MAPPING as MODEL_ARCHITECTURES_MAPPING
from .create import create_model as create_model
from .hub import from_pretrained as from_pretrained
from .model import SegmentationModel as SegmentationModel
