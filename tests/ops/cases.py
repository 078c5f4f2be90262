"""Operands and one call of the operator, for the tests of either implementation."""

from __future__ import annotations

import torch

from kernels import vocab_parallel_linear_logprob

# Bars: forward (absolute), gradients (relative to the largest). float32 is its own rounding over
# sums of D and V terms; in bfloat16 and float16 the gradients are rounded once on return, and
# bfloat16 GEMMs of the backward take dz in bfloat16.
BARS = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (1e-5, 2e-5),
    torch.bfloat16: (1e-5, 8e-3),
    torch.float16: (1e-5, 1e-3),
}


def make(n, d, v, dtype=torch.float32, bias=False, seed=0, scale=1.0, device="cpu"):
    """Operands with peaked logits (uniform ones hide errors) and gradients of mixed sign."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    operands = {"hidden": randn(n, d) * scale * 2 / d**0.5, "weight": randn(v, d)}
    if bias:
        operands["bias"] = randn(v)
    operands = {k: x.to(device, dtype).requires_grad_() for k, x in operands.items()}
    labels = torch.randint(0, v, (n,), generator=generator).to(device)
    return operands, labels, randn(n).to(device), randn(n).to(device)


def run(operands, labels, grad_logps, grad_entropy=None, **options):
    """(logps, entropy or None, gradients by name) of the operator."""
    options["return_entropy"] = grad_entropy is not None
    out = vocab_parallel_linear_logprob(labels=labels, **operands, **options)
    logps, entropy = out if grad_entropy is not None else (out, None)
    loss = (logps * grad_logps.to(logps.dtype)).sum()
    if grad_entropy is not None:
        loss = loss + (entropy * grad_entropy.to(logps.dtype)).sum()
    grads = torch.autograd.grad(loss, list(operands.values()))
    entropy = None if entropy is None else entropy.detach()
    return logps.detach(), entropy, dict(zip(operands, grads, strict=True))
