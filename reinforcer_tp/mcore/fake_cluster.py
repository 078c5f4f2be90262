"""One rank of a cluster that is not there: real groups without peers, tensors without data.

Everything the trainer builds and runs on a rank can be built and run here, the 70B model on 64
ranks included: Megatron's own code, our own, shapes, groups and collectives, but no arithmetic.
Tensors stand on the CPU (a CPU build of torch has no others). `on_gpu` takes the paths that CUDA
would take all the same: the varlen attention, the fused norm, and the Triton operator, of which
only the launches are left out.

What has no meaning without peers or data is replaced, here and nowhere else, while it lasts.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer import clip_grads
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import kernels.blocks
import kernels.collectives
import kernels.linear_logprob
from reinforcer_tp.mcore import model, optim, schedule
from reinforcer_tp.mcore.cpu import apply_cpu_support
from reinforcer_tp.mcore.topology import Topology, megatron_topology

_ADAM = sys.modules[torch.optim.Adam.__module__]  # torch.optim hides it
_ARCHITECTURE = 90  # the operator's block sizes are those of sm_90


@contextlib.contextmanager
def fake_rank(
    *,
    rank: int,
    world_size: int,
    tp_size: int,
    pp_size: int,
    vpp_size: int = 1,
    on_gpu: bool,
    read: Callable[[Any], Any] = lambda operator: 0,
) -> Iterator[Topology]:
    """Within it, this process is `rank` of `world_size`, and what it computes has no values.

    Where the program asks for one (`.item()`, `bool()`: on a GPU the host waits for it), it gets
    what `read` says, called with the operator; `nonzero` finds nothing. Needs a process without
    CUDA devices (CUDA_VISIBLE_DEVICES="") and without process groups.
    """
    apply_cpu_support()
    assert not dist.is_initialized(), "a fake rank needs a process without process groups"
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tp_size,
            pipeline_model_parallel_size=pp_size,
            virtual_pipeline_model_parallel_size=vpp_size if vpp_size > 1 else None,
            create_gloo_process_groups=False,
        )
        with contextlib.ExitStack() as stack:
            stack.enter_context(_without_peers_or_data())
            if on_gpu:
                stack.enter_context(_paths_of_cuda())
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            stack.enter_context(_Values(read))
            yield megatron_topology(vpp_size, local_rank=0, device=torch.device("cpu"))
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


@contextlib.contextmanager
def _replaced(*replacements: tuple[Any, str, Any]) -> Iterator[None]:
    """(object, name, value): the attributes have these values while it lasts."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in replacements]
    try:
        for owner, name, value in replacements:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


class _Values(TorchDispatchMode):
    """Answers for what fake tensors cannot: reads of values, collectives that are coalesced."""

    def __init__(self, read: Callable[[Any], Any]) -> None:
        super().__init__()
        self._read = read

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:  # the most frequent one
            return args[0].fake_device
        if func is torch.ops.aten._local_scalar_dense.default:
            answer, known = self._read(func), args[0].constant  # what the host has written itself
            return answer if known is None else known.item()
        if func is torch.ops.aten.nonzero.default:
            self._read(func)
            return torch.empty(0, args[0].ndim, dtype=torch.int64)
        if func.namespace == "c10d" and "coalesced" in func.__name__:
            return FakeWork().boxed()
        return func(*args, **(kwargs or {}))


def _without_peers_or_data() -> contextlib.AbstractContextManager[None]:
    def everyone_says(found: list, value: Any, group: Any = None) -> None:
        found[:] = [value] * len(found)

    return _replaced(
        (dist, "all_gather_object", everyone_says),
        (parallel_state, "get_data_parallel_group_gloo", lambda *args, **kwargs: None),
        (parallel_state, "get_expert_data_parallel_group_gloo", lambda *args, **kwargs: None),
        (CudaRNGStatesTracker, "fork", lambda self, name=None: contextlib.nullcontext()),
        (_ADAM, "_get_value", lambda step: 1.0),  # it divides by 1 - beta ** step
        (clip_grads, "l2_norm_impl", lambda *_: (torch.zeros(1), None)),  # reads in 2**16 parts
        # A parameter without data cannot be swapped for itself, and stands where it should.
        (model.HiddenStateModel, "to", lambda self, device: self),
        (schedule, "prepared", _prepared_on_host(schedule.prepared)),
    )


def _prepared_on_host(prepared: Callable) -> Callable:
    """Batches are real on the host; what would go to the device loses its data on the way."""

    def prepare(stage, batches) -> Iterator[Any]:
        items = prepared(stage, batches)
        while True:
            with _disable_current_modes():
                item = next(items, None)
            if item is None:
                return
            yield _without_data(item)

    return prepare


def _without_data(item: Any) -> Any:
    if isinstance(item, Tensor):
        return torch.empty(item.shape, dtype=item.dtype)
    if isinstance(item, tuple):
        return tuple(_without_data(each) for each in item)
    if dataclasses.is_dataclass(item):
        values = {field.name: getattr(item, field.name) for field in dataclasses.fields(item)}
        changed = {k: _without_data(v) for k, v in values.items() if not isinstance(v, (int, str))}
        return dataclasses.replace(item, **changed)
    return item


def _paths_of_cuda() -> contextlib.AbstractContextManager[None]:
    from kernels import linear_logprob_triton as triton_operator

    make_params = model.packed_attention_params

    def with_kernel(batch, **kwargs):
        return make_params(batch, **(kwargs | {"has_kernel": True}))

    def fused_norm(self, x: Tensor) -> Tensor:  # what F.rms_norm is on CUDA
        return torch.ops.aten._fused_rms_norm(x, self.weight.shape, self.weight, self.eps)[0]

    def blocks(hidden: Tensor, weight: Tensor, head) -> Any:
        dtype = torch.promote_types(hidden.dtype, weight.dtype)
        aligned = 8  # torch's allocator aligns to more
        has_softcap = head.softcap is not None
        return kernels.blocks.blocks_for(
            _ARCHITECTURE, hidden.shape[1], dtype, aligned, has_softcap
        )

    return _replaced(
        (model, "packed_attention_params", with_kernel),
        (model.RMSNorm, "forward", fused_norm),
        (optim, "fuse_adam", lambda optimizer: None),  # on the CPU only
        (kernels.linear_logprob, "_implementation", lambda impl, *_: triton_operator),
        (kernels.linear_logprob, "check_label_range", lambda *_: None),  # on the CPU only
        (kernels.linear_logprob, "add_product", _product_of_cuda),
        (kernels.collectives, "add_product", _product_of_cuda),
        (triton_operator, "INTERPRETED", False),
        (triton_operator, "_blocks", blocks),
        (_ADAM, "_default_to_fused_or_foreach", lambda *_, **__: (False, True)),
        (triton_operator, "_launch", _check_launch),
        (triton_operator, "merge_kernel", _NoLaunch()),
        (triton_operator, "cached_dlogits_kernel", _NoLaunch()),
    )


def _product_of_cuda(
    out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool, may_round: bool = False
) -> None:
    """kernels.gemm.add_product on CUDA: one GEMM with a float32 result, and no temporary."""
    assert a.dtype == b.dtype and out.shape == (a.shape[0], b.shape[1]), (out, a, b)
    assert a.shape[1] == b.shape[0], (a.shape, b.shape)


def _check_launch(kernel, hidden: Tensor, weight: Tensor, bias, head, blocks, **arguments) -> None:
    labels, *_ = arguments["pointers"]
    assert hidden.shape[1] == weight.shape[1], (hidden.shape, weight.shape)
    assert labels.shape == (len(hidden),) and bias is None, (labels.shape, hidden.shape)


class _NoLaunch:
    """A Triton kernel whose launches do nothing: kernel[grid](...)."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert all(size > 0 for size in grid), grid
        return lambda *args, **kwargs: None
