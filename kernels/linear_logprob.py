"""Vocab-parallel linear log-prob: the public operator, its checks and its autograd Function.

Legend: N tokens, D hidden, V vocab rows of this rank.

    z[n, v] = softcap((hidden[n] . weight[v] + bias[v]) / temperature)
    logp[n] = z[n, y] - log sum_v exp z[n, v]             y = labels[n], v over all ranks' real rows

The label's column is kept out of the sum. With s = sum over v != y of exp(z - m) for an anchor m,
x = m - z[n, y] + log s gives logp = -softplus(x) and 1 - p_y = sigmoid(x), both exact to rounding
for confident tokens, where 1 - exp(logp) has no correct digit left.

    dL/dz[n, v] = g[n] (onehot(y) - p[n, v]), at the label written as g[n] sigmoid(x[n])
    dhidden = dz @ weight, dweight = dz^T @ hidden        library GEMMs, chunk by chunk of the vocab

Forward saves its inputs (rows gathered from other ranks included), x and the log of the whole sum.
Backward computes each chunk of logits again (strict, 8NVD FLOPs in all), but for the columns whose
exponentials forward kept within `cache_budget_bytes` (cached, 6NVD). Tensor-parallel ranks exchange
12 bytes a token in forward (16 with entropy) and sum dhidden in backward, which overlaps the last
dweight GEMM. The two inner parts, forward's statistics and backward's dz, are
`kernels.linear_logprob_triton` (CUDA) or `kernels.reference`.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor

from kernels import reference
from kernels.arguments import (
    check_label_range,
    check_operands,
    check_options,
    check_rows,
    checked_vocab,
)
from kernels.collectives import HiddenGradient, gather_rows
from kernels.gemm import add_product, exact_matmul
from kernels.head import Chunk, Head, RowFactors, gradient_dtype, softplus


def vocab_parallel_linear_logprob(
    hidden: Tensor,  # (N, D), or this rank's rows of it (`row_splits`)
    weight: Tensor,  # (V, D) this rank's rows of the output weight
    labels: Tensor,  # (N,) int64 or int32, ids in the whole vocabulary
    *,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    bias: Tensor | None = None,  # (V,)
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    return_entropy: bool = False,
    entropy_grad: bool = True,
    cache_budget_bytes: int = 0,
    row_splits: Sequence[int] | None = None,
    check_labels: bool | None = None,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each label, and (`return_entropy`) the entropy, without the (N, V) logits.

    `vocab_start` is the id of this rank's first row; shards follow each other without a gap (None:
    0; only without `tp_group`). `vocab_size` counts the real ids of the whole
    vocabulary; rows from there on are padding that takes no part, whatever it holds (None: every
    row is real; only without `tp_group`). `tp_group` holds the ranks that share the vocabulary
    (None: not sharded); each passes the same `hidden` and `labels` and uses the result alike.
    With `row_splits` (sequence parallelism; alike on all ranks) each passes only its own rows of
    `hidden`, `row_splits[rank]` of the N, in the order of ranks; they are gathered here and dhidden
    comes back reduce-scattered. `logit_softcap` c maps z to c tanh(z / c).

    `cache_budget_bytes` bounds what forward keeps so that backward need not multiply again; 0
    keeps nothing. The entropy's gradient needs the logits themselves: nothing is kept with
    `return_entropy` unless `entropy_grad` is False, which leaves the entropy without a gradient.
    float16 costs more: its dz is float32.

    `impl`: "triton" (CUDA), "torch", or "auto", which is triton on CUDA and torch elsewhere.
    `check_labels` (None: on the CPU only) looks for labels out of range; on CUDA that waits for the
    device, and without it such a label yields -inf.

    Returns (N,) in float32, or float64 for float64 operands, alike on every rank. Statistics are
    kept in that precision whatever the operands are. Differentiable once in hidden, weight and
    bias, entropy included. `hidden`'s gradient is summed over `tp_group` here, nowhere else; the
    caller must not reduce it again. A weight under Megatron's DDP (it has `main_grad` and
    `grad_added_to_main_grad`) gets its gradient added to `main_grad` directly, as Megatron's own
    layers do under `gradient_accumulation_fusion`; `.grad` is then a placeholder.

    Every rank of `tp_group` must call it, also with N = 0 or without any real row. While it runs
    torch's global matmul settings are changed; calls in several threads take turns.

    Raises ValueError for shapes, options and labels that do not fit, NotImplementedError for
    second derivatives and for what the Triton kernels do not take (float64).
    """
    check_operands(hidden, weight, labels, bias)
    check_options(temperature, logit_softcap, cache_budget_bytes)
    sharded = tp_group is not None and dist.get_world_size(tp_group) > 1
    check_rows(hidden, labels, row_splits, tp_group)
    vocab_start, vocab_size = checked_vocab(vocab_start, vocab_size, len(weight), sharded)
    backend = _implementation(impl, hidden, weight)
    if (labels.device.type == "cpu") if check_labels is None else check_labels:
        check_label_range(labels, vocab_size)
    head = Head(
        vocab_start=vocab_start,
        num_rows=min(max(vocab_size - vocab_start, 0), len(weight)),
        tp_group=tp_group if sharded else None,
        row_splits=row_splits if sharded else None,
        temperature=float(temperature),
        softcap=logit_softcap,
        with_entropy=return_entropy,
    )
    operands = [t for t in (hidden, weight, bias) if t is not None]
    differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in operands)
    needs_logits = return_entropy and entropy_grad
    budget = cache_budget_bytes if differentiable and not needs_logits else 0
    logps, entropy = LinearLogprobFunction.apply(
        hidden, weight, bias, labels, head, budget, backend, entropy_grad
    )
    return (logps, entropy) if return_entropy else logps


def _implementation(impl: str, hidden: Tensor, weight: Tensor) -> ModuleType:
    if impl not in ("auto", "triton", "torch"):
        raise ValueError(f"impl={impl!r}; expected 'auto', 'triton' or 'torch'")
    if impl == "torch" or (impl == "auto" and not hidden.is_cuda):
        return reference
    from kernels import linear_logprob_triton  # needs the triton package

    linear_logprob_triton.check_operands(hidden, weight)
    return linear_logprob_triton


class LinearLogprobFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, head, cache_budget_bytes, backend, entropy_grad):
        ctx.head, ctx.backend = head, backend
        ctx.set_materialize_grads(False)
        rows = gather_rows(hidden, head)
        with torch.cuda.device_of(hidden), exact_matmul(rows, weight):
            stats, ctx.cache = backend.forward_statistics(
                rows, weight, bias, labels, head, cache_budget_bytes
            )
        merged = _merge_ranks(stats, head.tp_group, backend.UNIT)
        ctx.save_for_backward(rows, weight, bias, labels, *merged)
        fused = getattr(weight, "main_grad", None) is not None
        fused = fused and hasattr(weight, "grad_added_to_main_grad")
        ctx.fused_weight = weight if fused else None
        x, *_, entropy = merged
        if entropy is not None and not entropy_grad:
            ctx.mark_non_differentiable(entropy)
        return -softplus(x), entropy

    @staticmethod
    def backward(ctx, grad_logps, grad_entropy):
        if torch.is_grad_enabled():  # create_graph=True
            raise NotImplementedError("vocab_parallel_linear_logprob is differentiable only once")
        saved = ctx.saved_tensors  # unpacked once: activation recompute allows no more
        with torch.cuda.device_of(saved[0]), exact_matmul(*saved[:2]):
            grad_hidden, grad_weight, grad_bias = _backward(ctx, saved, grad_logps, grad_entropy)
        return (
            None if grad_hidden is None else grad_hidden.finish(),
            None if grad_weight is None else grad_weight.finish(),
            grad_bias,
            *(None, None, None, None, None),
        )


def _merge_ranks(stats: Tensor, group, unit: float) -> tuple[Tensor | None, ...]:
    """All ranks' statistics (3 or 4, N) -> (x, anchor, log of the whole sum less the anchor, the
    label's z, entropy or None), each (N,), the same on all. Logits and anchors count in `unit`
    nats, the others in nats.

    Statistics: anchor m, sum of exp(z - m), the label's z, and with entropy the sum of
    (z - m) exp(z - m); sums run over the rank's columns without the label's. -inf = not here.
    """
    gathered = stats[None]
    if group is not None:
        # One collective over the ranks that share the vocabulary; merged in rank order.
        gathered = stats.new_empty(dist.get_world_size(group), *stats.shape)
        dist.all_gather_single(gathered.flatten(0, 1), stats, group=group)
    anchors, totals, targets = gathered[:, 0], gathered[:, 1], gathered[:, 2]
    anchor, target = anchors.amax(0), targets.amax(0)
    scale = ((anchors - anchor) * unit).exp()
    log_total = (totals * scale).sum(0).log()
    x = (anchor - target) * unit + log_total
    log_sum = torch.maximum(log_total, (target - anchor) * unit) + x.abs().neg().exp().log1p()
    if len(stats) == 3:
        return x, anchor, log_sum, target, None
    weighted = ((gathered[:, 3] + totals * (anchors - anchor)) * scale).sum(0) * unit
    limits = torch.finfo(stats.dtype)
    mean = weighted / log_total.exp().clamp(min=limits.tiny)  # of the other columns' z - anchor
    entropy = (-x).sigmoid() * softplus(x).clamp(max=limits.max) + x.sigmoid() * (log_sum - mean)
    return x, anchor, log_sum, target, entropy


def _backward(ctx, saved, grad_logps, grad_entropy):
    """Gradients of hidden, weight (both to be finished) and bias, None where nobody asked."""
    hidden, weight, bias, labels, *merged = saved
    dtype = merged[0].dtype
    wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
    head = ctx.head
    # dz is made in the cache's place, so a second backward (retain_graph) multiplies again.
    cache, ctx.cache = ctx.cache, None
    factors = _row_factors(head, *merged, grad_logps, grad_entropy)
    grad_hidden = HiddenGradient(hidden, dtype, head) if wants_hidden else None
    grad_weight = _WeightGradient(weight, ctx.fused_weight) if wants_weight else None
    grad_bias = torch.zeros_like(bias) if wants_bias else None
    operand = hidden.to(gradient_dtype(hidden, weight)) if wants_weight else None
    for chunk in ctx.backend.dlogit_chunks(hidden, weight, bias, labels, head, factors, cache):
        if wants_hidden:
            grad_hidden.add(chunk)
            if chunk.end == head.num_rows:
                grad_hidden.start_reduction()  # overlaps what follows
        if wants_bias:
            grad_bias[chunk.begin : chunk.end] = chunk.dz.sum(0, dtype=dtype)
        if wants_weight:
            grad_weight.add(chunk, operand)
    return grad_hidden, grad_weight, grad_bias


def _row_factors(head, x, anchor, log_sum, target, entropy, grad_logps, grad_entropy) -> RowFactors:
    grad = torch.zeros_like(x) if grad_logps is None else grad_logps.to(x.dtype) / head.temperature
    at_target = x.sigmoid() * grad
    if grad_entropy is not None:
        grad_entropy = grad_entropy.to(x.dtype) / head.temperature
        # dH/dz = -p (log p + H)
        at_target -= (-x).sigmoid() * (entropy - softplus(x)) * grad_entropy
    per_sum = (-log_sum).exp()
    return RowFactors(
        anchor=anchor,
        grad=grad * per_sum,
        at_target=at_target,
        target=target,
        grad_entropy=None if grad_entropy is None else grad_entropy * per_sum,
        entropy=None if grad_entropy is None else entropy - log_sum,
    )


class _WeightGradient:
    """Where dweight goes: a tensor of the weight's type, or straight into Megatron's main_grad."""

    def __init__(self, weight: Tensor, fused_weight: Tensor | None):
        self.fused_weight = fused_weight
        self.grad = torch.empty_like(weight) if fused_weight is None else fused_weight.main_grad
        self.end = 0

    def add(self, chunk: Chunk, hidden: Tensor) -> None:  # hidden (N, D) in dz's type
        rows = self.grad[chunk.begin : chunk.end]
        add_product(rows, chunk.dz.t(), hidden, accumulate=self.fused_weight is not None)
        self.end = chunk.end

    def finish(self) -> Tensor:
        weight = self.fused_weight
        if weight is None:
            self.grad[self.end :] = 0  # padding, or no token at all
            return self.grad
        # DDP's hook wants a .grad to be there and drops it, but adds it to main_grad when
        # `zero_out_wgrad` says that another use of the weight (a tied embedding) adds to it.
        weight.grad_added_to_main_grad = True
        shared = getattr(weight, "zero_out_wgrad", False)
        return torch.zeros_like(weight) if shared else torch.empty_like(weight)
