from .checking import check_decoder as check_decoder
from .create import MODEL_ARCHITECTURES_MAPPING as MODEL_ARCHITECTURES_MAPPING
from .create import create_model as create_model
from .hub import from_pretrained as from_pretrained
from .model import SegmentationModel as SegmentationModel
from .smp_state import smp_state_dict as smp_state_dict
