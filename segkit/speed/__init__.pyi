from . import benchmark as benchmark
