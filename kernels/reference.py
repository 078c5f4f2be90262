"""Vocab-parallel linear log-prob in plain torch: the CPU implementation and the reference.

Legend: N tokens, D hidden, V vocab rows of this rank, w columns of one vocab chunk, R ranks.

    z[n, v] = softcap((hidden[n] . weight[v] + bias[v]) / temperature)
    logp[n] = z[n, y] - log sum_v exp z[n, v]             y = labels[n], v over all ranks' real rows

The target column is kept out of the sum. With s = sum over v != y of exp(z - m) for an anchor m,
x = m - z[n, y] + log s gives logp = -softplus(x) and 1 - p_y = sigmoid(x), both exact to rounding
for confident tokens, where 1 - exp(logp) has no correct digit left.

    dL/dz[n, v] = g[n] (onehot(y) - p[n, v]), at the target written as g[n] sigmoid(x[n])

Forward holds one (N, w) chunk at a time and saves its inputs, x and the log of the whole sum, so
backward computes each chunk of logits again: 8NVD FLOPs in all against 6NVD with all logits kept.
Tensor-parallel ranks exchange 12 bytes a token in forward and all-reduce dhidden in backward.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

# Largest temporary of the operator. Big enough for efficient GEMMs, small beside any model.
SCRATCH_BYTES = 32 * 2**20
MIN_CHUNK = 64  # columns; less starves the GEMM
_LOWEST = -3e38  # anchor of "no column yet"; finite, so that differences of anchors stay defined


@dataclass(frozen=True, kw_only=True)
class Head:
    """What the operator knows about the head beside its tensors; checked by the public operator."""

    vocab_start: int  # id of this rank's first row
    num_rows: int  # real rows of this rank
    tp_group: dist.ProcessGroup | None  # None when the vocabulary is not sharded
    temperature: float
    softcap: float | None
    with_entropy: bool


def linear_logprob_ref(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, head: Head
) -> tuple[Tensor, Tensor | None]:
    """`vocab_parallel_linear_logprob` for checked arguments: log-probs, and entropy or None."""
    return _LinearLogprob.apply(hidden, weight, bias, labels, head)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, head):
        ctx.head = head
        ctx.set_materialize_grads(False)
        with _exact_matmul(hidden, weight):
            stats = _local_stats(hidden, weight, bias, labels, head)
        x, lse, entropy = _merge_stats(stats, head.tp_group)
        ctx.save_for_backward(hidden, weight, bias, labels, x, lse, entropy)
        fused = hasattr(weight, "main_grad") and hasattr(weight, "grad_added_to_main_grad")
        ctx.fused_weight = weight if fused else None
        return -_softplus(x), entropy

    @staticmethod
    def backward(ctx, grad_logps, grad_entropy):
        if torch.is_grad_enabled():  # create_graph=True
            raise NotImplementedError("vocab_parallel_linear_logprob is differentiable only once")
        saved = ctx.saved_tensors  # unpacked once: activation recompute allows no more
        with _exact_matmul(*saved[:2]):
            grads = _backward(ctx, saved, grad_logps, grad_entropy)
        return *grads, None, None


def _local_stats(hidden, weight, bias, labels, head) -> Tensor:
    """(3 or 4, N): anchor m, sum of exp(z - m), the target's z, and the entropy's sum of
    (z - m) exp(z - m); sums run over this rank's columns without the target's. -inf = not here."""
    dtype = _stats_dtype(hidden, weight)
    anchor = hidden.new_full((len(hidden),), _LOWEST, dtype=dtype)
    target = torch.full_like(anchor, -math.inf)
    total, weighted = torch.zeros_like(anchor), torch.zeros_like(anchor)
    buffers = 1 + (head.softcap is not None) + head.with_entropy
    operand = hidden.to(_gemm_dtype(hidden, weight))
    for begin, z, _ in _logit_chunks(operand, weight, bias, head, buffers):
        column, inside = _target_column(labels, head.vocab_start + begin, z.shape[1])
        z_target = z.gather(1, column)
        target = torch.where(inside, z_target, target[:, None])[:, 0]
        z.scatter_(1, column, z_target.masked_fill(inside, -math.inf))
        new_anchor = torch.maximum(anchor, z.amax(1))
        scale = (anchor - new_anchor).exp_()
        exp_z = z.sub_(new_anchor[:, None]).exp_()
        if head.with_entropy:
            weighted += total * (anchor - new_anchor)
            weighted = weighted * scale - torch.special.entr(exp_z).sum(1)
        total = total * scale + exp_z.sum(1)
        anchor = new_anchor
    return torch.stack([anchor, total, target, weighted][: 3 + head.with_entropy])


def _merge_stats(stats: Tensor, group) -> tuple[Tensor, Tensor, Tensor | None]:
    """All ranks' statistics -> (x, log of the whole sum, entropy), each (N,), the same on all."""
    gathered = stats[None]
    if group is not None:
        # One collective over the ranks that share the vocabulary; merged in rank order.
        gathered = stats.new_empty(dist.get_world_size(group), *stats.shape)
        dist.all_gather_single(gathered.flatten(0, 1), stats, group=group)
    anchors, totals, targets = gathered[:, 0], gathered[:, 1], gathered[:, 2]
    anchor, target = anchors.amax(0), targets.amax(0)
    scale = (anchors - anchor).exp()
    total = (totals * scale).sum(0)
    rest = anchor + total.log()
    x, lse = rest - target, torch.logaddexp(rest, target)
    if len(stats) == 3:
        return x, lse, None
    weighted = ((gathered[:, 3] + totals * (anchors - anchor)) * scale).sum(0)
    mean_rest = anchor + weighted / total.clamp(min=torch.finfo(total.dtype).tiny)
    return x, lse, (-x).sigmoid() * _softplus(x) + x.sigmoid() * (lse - mean_rest)


def _backward(ctx, saved, grad_logps, grad_entropy) -> tuple[Tensor | None, ...]:
    """Gradients of hidden, weight and bias, each None where nobody asked for it."""
    hidden, weight, bias, labels, x, lse, entropy = saved
    wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
    dtype, head = lse.dtype, ctx.head
    rows = [x, lse, *_row_grads(lse, grad_logps, grad_entropy, head.temperature)]
    operand = hidden.to(_gemm_dtype(hidden, weight))
    operands = _grad_gemm_dtype(operand)
    grad_hidden = hidden.new_zeros(hidden.shape, dtype=dtype) if wants_hidden else None
    weight_grad = _WeightGrad(weight, ctx.fused_weight) if wants_weight else None
    grad_bias = torch.zeros_like(bias) if wants_bias else None
    buffers = 1 + (head.softcap is not None) + 2 * (grad_entropy is not None)
    for begin, z, columns in _logit_chunks(operand, weight, bias, head, buffers):
        end = begin + z.shape[1]
        column, inside = _target_column(labels, head.vocab_start + begin, z.shape[1])
        dz = _dlogits(z, column, inside, rows, entropy, head.softcap)
        if wants_bias:
            grad_bias[begin:end] = dz.sum(0)
        dz = dz.to(operands)
        if wants_hidden:
            _add_mm(grad_hidden, dz, columns.to(operands))
        if wants_weight:
            weight_grad.add(begin, end, _mm(dz.t(), operand.to(operands), dtype))
    if wants_hidden and head.tp_group is not None:
        # The one reduction of dhidden over the ranks that share the vocabulary.
        dist.all_reduce(grad_hidden, group=head.tp_group)
    return (
        grad_hidden.to(hidden.dtype) if wants_hidden else None,
        weight_grad.finish() if wants_weight else None,
        grad_bias,
    )


def _dlogits(z, column, inside, rows, entropy, softcap) -> Tensor:
    """dL/d(hidden . weight + bias) * temperature of one chunk, in the place of its logits z."""
    x, lse, grad, grad_entropy = rows
    slope = 1 - (z / softcap).square_() if softcap is not None else None
    z.sub_(lse[:, None])
    at_target = x.sigmoid() * grad
    if grad_entropy is None:
        dz = z.exp_().mul_(-grad[:, None])
    else:
        # dH/dz = -p (log p + H)
        per_logit = (z + entropy[:, None]).mul_(grad_entropy[:, None]).add_(grad[:, None])
        dz = z.exp_().mul_(per_logit).neg_()
        at_target -= (-x).sigmoid() * (entropy - _softplus(x)) * grad_entropy
    dz.scatter_(1, column, torch.where(inside, at_target[:, None], dz.gather(1, column)))
    return dz if slope is None else dz.mul_(slope)


def _logit_chunks(operand, weight, bias, head, buffers) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yields (first row, z (N, w), its weight rows (w, D)) over this rank's real rows.

    z is the same scratch every time. `buffers` counts the (N, w) temporaries of the caller.
    """
    dtype, (n, d) = _stats_dtype(operand, weight), operand.shape
    width = chunk_width(n, d, dtype.itemsize, buffers)
    scratch = operand.new_empty(n * min(width, head.num_rows), dtype=dtype)
    for begin in range(0, head.num_rows, width):
        end = min(begin + width, head.num_rows)
        columns = weight[begin:end].to(operand.dtype)
        z = scratch[: n * (end - begin)].view(n, end - begin)
        _mm(operand, columns.t(), dtype, out=z)
        if bias is not None:
            z += bias[begin:end]
        if head.temperature != 1.0:
            z /= head.temperature
        if head.softcap is not None:
            z.div_(head.softcap).tanh_().mul_(head.softcap)
        yield begin, z, columns


def chunk_width(n: int, d: int, itemsize: int, buffers: int = 1) -> int:
    """Vocab columns of one chunk: logits, a weight slice and its gradient within SCRATCH_BYTES."""
    return max(SCRATCH_BYTES // (itemsize * (buffers * n + 2 * d)), MIN_CHUNK)


class _WeightGrad:
    """Where dweight goes: a tensor of the weight's type, or straight into Megatron's main_grad."""

    def __init__(self, weight: Tensor, fused_weight: Tensor | None):
        self.fused_weight = fused_weight
        self.grad = torch.zeros_like(weight) if fused_weight is None else fused_weight.main_grad

    def add(self, begin: int, end: int, rows: Tensor) -> None:
        if self.fused_weight is None:
            self.grad[begin:end].copy_(rows)  # assignment would make a rounded copy first
        else:
            self.grad[begin:end] += rows

    def finish(self) -> Tensor:
        weight = self.fused_weight
        if weight is None:
            return self.grad
        # DDP's hook wants a .grad to be there and drops it, but adds it to main_grad when
        # `zero_out_wgrad` says that another use of the weight (a tied embedding) adds to it.
        weight.grad_added_to_main_grad = True
        shared = getattr(weight, "zero_out_wgrad", False)
        return torch.zeros_like(weight) if shared else torch.empty_like(weight)


def _row_grads(lse, grad_logps, grad_entropy, temperature) -> tuple[Tensor, Tensor | None]:
    grad = torch.zeros_like(lse) if grad_logps is None else grad_logps.to(lse.dtype) / temperature
    if grad_entropy is None:
        return grad, None
    return grad, grad_entropy.to(lse.dtype) / temperature


def _target_column(labels: Tensor, first_id: int, width: int) -> tuple[Tensor, Tensor]:
    """(N, 1) column of each label in a chunk, clamped into it, and whether it is really there."""
    column = labels.long()[:, None] - first_id
    return column.clamp(0, width - 1), (column >= 0) & (column < width)


def _softplus(x: Tensor) -> Tensor:
    # torch's own softplus is linear above 20, which is wrong in float64.
    return x.clamp(min=0) + x.abs().neg().exp().log1p()


def _stats_dtype(a: Tensor, b: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)


def _gemm_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    # A CPU GEMM of bfloat16 rounds its result to bfloat16: multiply float32 copies there.
    if hidden.device.type == "cpu":
        return _stats_dtype(hidden, weight)
    return torch.promote_types(hidden.dtype, weight.dtype)


def _grad_gemm_dtype(operand: Tensor) -> torch.dtype:
    # g p underflows in float16.
    return torch.float32 if operand.dtype == torch.float16 else operand.dtype


def _mm(a: Tensor, b: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    if a.dtype == dtype:
        return torch.mm(a, b, out=out)
    return torch.mm(a, b, out_dtype=dtype, out=out)  # CUDA: half operands, float32 result


def _add_mm(total: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += _mm(a, b, total.dtype)


@contextmanager
def _exact_matmul(hidden: Tensor, weight: Tensor) -> Iterator[None]:
    """No autocast; on the CPU float32 GEMMs in float32, but copies of bfloat16 operands on the
    bfloat16 units, which is exact for the logits (float32 accumulator and result)."""
    both_bfloat16 = hidden.dtype == weight.dtype == torch.bfloat16
    matmul = torch.backends.mkldnn.matmul
    saved = matmul.fp32_precision
    with torch.autocast(hidden.device.type, enabled=False):
        if hidden.device.type == "cpu":
            matmul.fp32_precision = "bf16" if both_bfloat16 else "ieee"
        try:
            yield
        finally:
            matmul.fp32_precision = saved
