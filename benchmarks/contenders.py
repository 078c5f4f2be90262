"""What the operator is measured against, all behind one signature, and the inputs they share.

Legend: N tokens, D hidden, V vocab rows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from kernels.linear_logprob import vocab_parallel_linear_logprob

# name: (default N, D, V)
SHAPES = {
    "llama8b": (8192, 4096, 128256),
    "llama8b-131072": (8192, 4096, 131072),  # the shape of most published figures
    "llama70b-tp8": (8192, 8192, 16032),  # one rank's work, without the collectives
    "qwen7b": (8192, 3584, 152064),
    "smollm2": (2048, 576, 49152),
    "tiny": (96, 64, 1000),
}
EVERYTHING = 2**40  # bytes of cache budget: all of forward's exponentials
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Inputs:
    hidden: Tensor  # (N, D), requires grad
    weight: Tensor  # (V, D), requires grad
    labels: Tensor  # (N,)
    grad: Tensor  # (N,) float32, upstream gradient of each log-prob, of mixed sign


@dataclass(frozen=True, kw_only=True)
class Contender:
    name: str
    gemms: int  # NDV products in forward + backward; 2 NDV FLOPs each
    forward: Callable[[Inputs], Tensor]  # -> log-probs (N,); of a bare GEMM anything
    backward: Callable[[Inputs, Tensor], tuple[Tensor, ...]]  # -> dhidden, dweight
    ours: bool = False
    rival: bool = False  # someone else's operator: may fail, may be too slow for every round
    bare: bool = False  # GEMMs only: no log-prob, so no parity


def make_inputs(n: int, d: int, v: int, dtype: torch.dtype, device: str) -> Inputs:
    """Logits of unit variance; every fourth token is confident, its label's logit 8 to 28."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(v, d, generator=generator) / d**0.5
    hidden = torch.randn(n, d, generator=generator)
    labels = torch.randint(v, (n,), generator=generator)
    label_rows = weight[labels[::4]]
    wanted = torch.linspace(8, 28, len(label_rows))[:, None]
    hidden[::4] *= 0.5
    missing = wanted - (hidden[::4] * label_rows).sum(1, keepdim=True)
    hidden[::4] += label_rows * missing / label_rows.square().sum(1, keepdim=True)
    return Inputs(
        hidden=hidden.to(device, dtype).requires_grad_(),
        weight=weight.to(device, dtype).requires_grad_(),
        labels=labels.to(device),
        grad=torch.randn(n, generator=generator).to(device),
    )


def make_contenders(
    inputs: Inputs, impl: str, skip: Collection[str] = ()
) -> tuple[list[Contender], dict[str, str]]:
    """The contenders for these inputs, and why the others are absent."""
    found = [
        _ours("ours-strict", 4, 0, impl),
        _ours("ours-cached", 3, EVERYTHING, impl),
        Contender(name="materialised", gemms=3, forward=_materialised, backward=_autograd),
    ]
    absent = {}
    for name, (package, forward) in RIVALS.items():
        if name in skip:
            absent[name] = "skipped on request"
        elif find_spec(package) is None:
            absent[name] = f"{package} is not installed"
        elif package != "torch" and inputs.hidden.device.type != "cuda":
            absent[name] = "needs CUDA"
        else:
            rival = Contender(name=name, gemms=4, forward=forward, backward=_autograd, rival=True)
            found.append(rival)
    return found + _bare_gemms(inputs), absent


def _autograd(inputs: Inputs, logps: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(logps, (inputs.hidden, inputs.weight), inputs.grad.to(logps.dtype))


def _ours(name: str, gemms: int, budget: int, impl: str) -> Contender:
    def forward(inputs):
        return vocab_parallel_linear_logprob(
            inputs.hidden, inputs.weight, inputs.labels, cache_budget_bytes=budget, impl=impl
        )

    return Contender(name=name, gemms=gemms, forward=forward, backward=_autograd, ours=True)


def _materialised(inputs: Inputs) -> Tensor:
    logits = (inputs.hidden @ inputs.weight.T).float()
    return logits.log_softmax(1).gather(1, inputs.labels[:, None])[:, 0]


def _torch_lce(inputs: Inputs) -> Tensor:
    return _torch_linear_cross_entropy(inputs, torch.nn.LinearCrossEntropyOptions())


def _torch_lce_1024(inputs: Inputs) -> Tensor:
    # Its own choice are chunks of N D / 2V tokens, which starve the GEMMs.
    options = torch.nn.LinearCrossEntropyOptions(chunking_method=None, batch_chunk_size=1024)
    return _torch_linear_cross_entropy(inputs, options)


def _torch_linear_cross_entropy(inputs: Inputs, options) -> Tensor:
    # Any options object makes it chunk (over tokens); with reduction="none" its backward takes a
    # gradient per token and computes the logits again.
    return -torch.nn.functional.linear_cross_entropy(
        inputs.hidden, inputs.weight, inputs.labels, reduction="none", options=options
    )


def _liger(inputs: Inputs) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="none")
    return -loss(inputs.weight, inputs.hidden, inputs.labels)


def _cut_cross_entropy(inputs: Inputs) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(inputs.hidden, inputs.weight, inputs.labels, reduction="none")


# name: (package, forward). All take a gradient per token and compute the logits again for it.
RIVALS = {
    "torch-lce": ("torch", _torch_lce),
    "torch-lce-1024": ("torch", _torch_lce_1024),
    "liger": ("liger_kernel", _liger),
    "cce": ("cut_cross_entropy", _cut_cross_entropy),
}


def _bare_gemms(inputs: Inputs) -> list[Contender]:
    """The library GEMMs of the operands' dtype alone: three are the floor of the cached mode and
    of kept logits, four that of the strict mode."""
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    logits = hidden.new_empty(len(hidden), len(weight))
    dhidden, dweight = torch.empty_like(hidden), torch.empty_like(weight)

    def forward(_):
        return torch.mm(hidden, weight.T, out=logits)

    def backward(*_):
        torch.mm(logits, weight, out=dhidden)
        torch.mm(logits.T, hidden, out=dweight)
        return dhidden, dweight

    def backward_again(*_):
        forward(None)
        return backward()

    return [
        Contender(name="gemms-3", gemms=3, forward=forward, backward=backward, bare=True),
        Contender(name="gemms-4", gemms=4, forward=forward, backward=backward_again, bare=True),
    ]
