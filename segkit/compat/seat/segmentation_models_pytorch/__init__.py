"""SMP's name, where the folder of this package stands in `sys.path`; the tree takes its place"""

import sys

from segkit.compat.install import SMP, install

if __name__ == SMP:
    del sys.modules[SMP]
    install()
