from . import smp as smp
