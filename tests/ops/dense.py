"""The linear log-prob with all its logits, in float64: what every implementation is judged by."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Result:
    logps: Tensor  # (N,)
    entropy: Tensor  # (N,)
    miss: Tensor  # (N,) 1 - p of the label, exact also when it is tiny
    grads: dict[str, Tensor]  # by name: hidden, weight, bias


def dense_result(
    hidden, weight, labels, *, bias=None, vocab_size=None, temperature=1.0, logit_softcap=None,
    grad_logps=None, grad_entropy=None,
) -> Result:  # fmt: skip
    """Forward and gradients of sum(grad_logps * logps) + sum(grad_entropy * entropy)."""
    inputs = {"hidden": hidden, "weight": weight, "bias": bias}
    inputs = {k: v.detach().double().requires_grad_() for k, v in inputs.items() if v is not None}
    logits = inputs["hidden"] @ inputs["weight"][:vocab_size].T
    if bias is not None:
        logits = logits + inputs["bias"][:vocab_size]
    logits = logits / temperature
    if logit_softcap is not None:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    column = labels.long()[:, None]
    target = logits.gather(1, column)[:, 0]
    # The rest of the vocabulary against the label, so that a confident label keeps its digits.
    rest = logits.scatter(1, column, -torch.inf).logsumexp(1)
    odds = rest - target
    logps = -torch.logaddexp(torch.zeros_like(odds), odds)
    probs = logits.softmax(1)
    entropy = torch.logsumexp(logits, 1) - (probs * logits).sum(1)
    loss = sum((x * g.double()).sum() for x, g in ((logps, grad_logps), (entropy, grad_entropy))
               if g is not None)  # fmt: skip
    grads = {}
    if torch.is_tensor(loss):
        grads = dict(zip(inputs, torch.autograd.grad(loss, list(inputs.values())), strict=True))
    return Result(
        logps=logps.detach(),
        entropy=entropy.detach(),
        miss=odds.sigmoid().detach(),
        grads=grads,
    )


def error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected value."""
    if expected.numel() == 0:
        return 0.0
    return float(
        (actual.detach().double() - expected).abs().max() / expected.abs().max().clamp(min=1e-300)
    )


def row_errors(actual: Tensor, expected: Tensor) -> Tensor:  # (N, ...) -> (N,)
    """Relative difference of each row, in the 2-norm."""
    difference = (actual.double() - expected).flatten(1).norm(dim=1)
    return difference / expected.flatten(1).norm(dim=1)


def row_error(actual: Tensor, expected: Tensor) -> float:
    return float(row_errors(actual, expected).max())
