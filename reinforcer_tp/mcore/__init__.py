"""The only package that imports megatron.core."""

import os
import warnings

from reinforcer_tp.mcore.cpu import no_compiler

# One warning per optional package that is missing, per module and rank; none changes numbers.
warnings.filterwarnings("ignore", module=r"megatron\.")
warnings.filterwarnings("ignore", message=r".*all_gather_into_tensor.*", category=FutureWarning)
warnings.filterwarnings("ignore", message=r".*reduce_scatter_tensor.*", category=FutureWarning)
# Megatron relies on kernel launches in order to overlap collectives with matrix products.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")

with no_compiler():
    import megatron.core  # noqa: F401
