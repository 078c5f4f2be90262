"""The Triton launches of one call of the operator, recorded and compiled without a GPU.

The operator runs on tensors of torch's `meta` device (shapes, no data) as if on a GPU, and a
recorder in the place of Triton's launch keeps what would have been compiled: argument types,
which of them are multiples of 16, constants, options and the grid.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import triton
from torch.utils.flop_counter import FlopCounterMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from kernels import linear_logprob, linear_logprob_triton
from kernels.head import Head

TARGETS = {"gfx942": GPUTarget("hip", "gfx942", 64)}


@dataclass(frozen=True, kw_only=True)
class Call:
    """A call of the operator, forward and backward, by one rank on one kind of GPU."""

    arch: int | str  # 10 major + minor of the compute capability, or gfx942
    n: int = 8192
    d: int = 4096
    v: int = 16032
    dtype: torch.dtype = torch.bfloat16
    weight_dtype: torch.dtype | None = None  # None: dtype
    bias: bool = False
    softcap: bool = False
    entropy: bool = False
    cached: bool = False  # forward keeps all of E; the entropy then has no gradient
    num_sms: int = 132


@dataclass(frozen=True)
class Launch:
    function: JITFunction
    target: GPUTarget
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict
    options: dict[str, Any]
    grid: int  # programs
    scalars: dict[str, Any]  # the numbers among the arguments

    @property
    def kernel(self) -> str:
        return self.function.fn.__name__

    @property
    def constexprs(self) -> dict[str, Any]:
        names = list(self.signature)
        return {names[path[0]]: value for path, value in self.constants.items() if len(path) == 1}

    def source(self) -> ASTSource:
        return ASTSource(self.function, self.signature, self.constants, self.attributes)

    def key(self) -> str:
        """The same for launches that run the same machine code."""
        return f"{self.source().hash()} {sorted(self.options.items(), key=str)} {self.target}"

    def compile(self):
        return triton.compile(self.source(), target=self.target, options=self.options)


def target_of(arch: int | str) -> GPUTarget:
    return TARGETS[arch] if arch in TARGETS else GPUTarget("cuda", arch, 32)


def record(call: Call) -> tuple[list[Launch], int]:
    """The launches of a forward and backward, in order, and the FLOPs of its library GEMMs."""
    if linear_logprob_triton.INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET is set: Triton compiles nothing; unset it")
    dtypes = (call.dtype, call.weight_dtype or call.dtype)
    hidden = torch.empty(call.n, call.d, dtype=dtypes[0], device="meta", requires_grad=True)
    weight = torch.empty(call.v, call.d, dtype=dtypes[1], device="meta", requires_grad=True)
    bias = None
    if call.bias:
        bias = torch.empty(call.v, dtype=dtypes[1], device="meta", requires_grad=True)
    labels = torch.empty(call.n, dtype=torch.int64, device="meta")
    head = Head(
        vocab_start=0,
        num_rows=call.v,
        tp_group=None,
        row_splits=None,
        temperature=1.0,
        softcap=30.0 if call.softcap else None,
        with_entropy=call.entropy,
    )
    flops = FlopCounterMode(display=False)
    with _pretended_gpu(call) as launches, flops:
        results = linear_logprob.LinearLogprobFunction.apply(
            *(hidden, weight, bias, labels, head, 2**50 if call.cached else 0),
            *(linear_logprob_triton, not call.cached),
        )
        sum(r.sum() for r in results if r is not None).backward()
    return launches, flops.get_total_flops()


@contextlib.contextmanager
def _pretended_gpu(call: Call) -> Iterator[list[Launch]]:
    """Meanwhile meta tensors count as on a GPU of call.arch; yields what is launched on it."""
    launches: list[Launch] = []
    target = target_of(call.arch)

    def run(kernel: JITFunction, *args, grid, warmup, **kwargs) -> None:
        launches.append(_specialized(kernel, target, args, kwargs, grid))

    arch = call.arch if isinstance(call.arch, int) else 0  # no table of its own
    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (JITFunction, "run", run),
            (linear_logprob_triton, "architecture", lambda device: arch),
            (linear_logprob_triton, "num_sms", lambda device: call.num_sms),
            # It asks for autocast, which has no meta device.
            (linear_logprob, "exact_matmul", lambda *operands: contextlib.nullcontext()),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield launches


def _specialized(kernel: JITFunction, target: GPUTarget, args, kwargs, grid) -> Launch:
    """What JITFunction.run does before it compiles."""
    backend = make_backend(target)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    kwargs = {"debug": False, **kwargs}
    bound, specialization, options = binder(*args, **kwargs)
    options, signature, constants, attributes = kernel._pack_args(
        backend, kwargs, bound, specialization, options
    )
    grid = grid(bound) if callable(grid) else grid
    return Launch(
        function=kernel,
        target=target,
        signature=signature,
        constants=constants,
        attributes=attributes,
        options=dict(options.__dict__),
        grid=grid[0],
        scalars={k: x for k, x in bound.items() if isinstance(x, int | float)},
    )
