"""`python -m segkit.compat.smp PROGRAM ...`: run a program on segkit in place of SMP"""

from ..install import main

if __name__ == "__main__": main()
