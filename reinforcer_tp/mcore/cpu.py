"""What Megatron-core needs to run without CUDA. Applied only when there is no CUDA device.

Megatron-core 0.16 names the device "cuda" in a few places (`torch.zeros(..., device="cuda")`,
`torch.cuda.current_device()`, `tensor.type() == "torch.cuda.FloatTensor"`). There is no setting for
it, so this module is the one place that assigns into `torch.cuda` and `megatron.*`. It answers
"cpu" where Megatron asks for the current CUDA device, and sums the gradient norm more exactly.
"""

import contextlib
import importlib
import types
from collections.abc import Iterator

import torch

_FACTORIES = ("zeros", "ones", "empty", "tensor")
# Modules that write device="cuda" into a factory call; seen in 0.16.1.
_MODULES_WITH_CUDA_LITERALS = (
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.optimizer.optimizer",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.optimizer.grad_scaler",
    "megatron.core.optimizer.distrib_optimizer",
    "megatron.core.distributed.param_and_grad_buffer",
    "megatron.core.utils",
)
# torch's float32 norm of one large CPU tensor is off by 6e-5 at 3M numbers, by 1.6e-3 at 28M.
_NORM_PART = 2**16
_applied = False


class _TorchOnCpu(types.ModuleType):
    """`torch` as the modules above see it: factories answer device="cuda" with a CPU tensor."""

    def __init__(self) -> None:
        super().__init__("torch")
        for name in _FACTORIES:
            setattr(self, name, self._on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str):
        return getattr(torch, name)

    @staticmethod
    def _on_cpu(factory):
        def make(*args, device=None, **kwargs):
            is_cuda = device is not None and str(device).startswith("cuda")
            return factory(*args, device="cpu" if is_cuda else device, **kwargs)

        return make


def _as_it_is(function=None, **options):
    """torch.compile's ways to be called: on a function, or with options for the function after."""
    return _as_it_is if function is None else function


@contextlib.contextmanager
def no_compiler() -> Iterator[None]:
    """Within it, without CUDA, `torch.compile` gives back the function that it is given.

    Megatron's modules decorate their fused functions when they are imported, and the decorator
    alone loads torch's compiler: a third of the time that the import of Megatron takes. On the CPU
    these functions are never called (`mcore.model` keeps the fusions off). Megatron keeps what it
    found under `jit_fuser`.
    """
    if torch.cuda.is_available():
        yield
        return
    original = torch.compile
    torch.compile = _as_it_is
    try:
        yield
    finally:
        torch.compile = original


def apply_cpu_support() -> None:
    """Makes Megatron-core usable on a machine without CUDA. Does nothing the second time.

    Raises:
        AssertionError: a CUDA device is there (our own invariant: the caller has to ask first).
    """
    global _applied
    assert not torch.cuda.is_available(), "CPU support must not be applied next to a CUDA device"
    if _applied:
        return
    _applied = True

    cpu = torch.device("cpu")
    torch.cuda.current_device = lambda: cpu
    torch.cuda.set_device = lambda device: None
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.current_stream = lambda device=None: None
    torch.cuda.manual_seed = torch.manual_seed
    torch.cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    torch.Tensor.cuda = lambda self, *args, **kwargs: self

    random = importlib.import_module("megatron.core.tensor_parallel.random")
    random._get_cuda_rng_state = lambda device=None, clone=False, graph_safe=False: (
        torch.get_rng_state()
    )
    random._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(
        new_state
    )
    proxy = _TorchOnCpu()
    for name in _MODULES_WITH_CUDA_LITERALS:
        importlib.import_module(name).torch = proxy
    importlib.import_module("megatron.core.optimizer.clip_grads").l2_norm_impl = _l2_norm


def _l2_norm(
    chunk_size: int, overflow: torch.Tensor, tensor_lists: list[list[torch.Tensor]], *unused
) -> tuple[torch.Tensor, None]:
    """Norm (1,) float32 of all tensors together; Megatron's local_multi_tensor_l2_norm, exact."""
    tensors = [tensor for tensors in tensor_lists for tensor in tensors]
    parts = [part for tensor in tensors for part in tensor.flatten().split(_NORM_PART)]
    norms = torch.stack(torch._foreach_norm(parts)).double()
    return norms.norm().float().reshape(1), None


@contextlib.contextmanager
def cuda_type_names():
    """Within it, CPU tensors call themselves "torch.cuda.FloatTensor" and so on.

    Megatron's optimizers sort parameters by that name when they are built and when they clip.
    On a machine with CUDA this changes nothing.
    """
    if torch.cuda.is_available():
        yield
        return
    original = torch.Tensor.type

    def cuda_type(self, dtype=None, *args, **kwargs):
        if dtype is not None:
            return original(self, dtype, *args, **kwargs)
        return original(self).replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = cuda_type
    try:
        yield
    finally:
        torch.Tensor.type = original
