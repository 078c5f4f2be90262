"""Vocab-parallel linear log-prob: the public operator, its checks and its implementations.

`torch` is `kernels.reference`, the only implementation so far.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.reference import Head, linear_logprob_ref


def vocab_parallel_linear_logprob(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D) this rank's rows of the output weight
    labels: Tensor,  # (N,) int64 or int32, ids in the whole vocabulary
    *,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    bias: Tensor | None = None,  # (V,)
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    return_entropy: bool = False,
    cache_budget_bytes: int = 0,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each label, and (`return_entropy`) the entropy, without the (N, V) logits.

    `vocab_start` is the id of this rank's first row. `vocab_size` counts the real ids of the whole
    vocabulary; rows from there on are padding that takes no part, whatever it holds (None: every
    row is real; only without `tp_group`). `tp_group` holds the ranks that share the vocabulary
    (None: not sharded); each passes the same `hidden` and `labels` and uses the result alike.
    `logit_softcap` c maps z to c tanh(z / c).

    Returns (N,) in float32, or float64 for float64 operands, alike on every rank. Statistics are
    kept in that precision whatever the operands are. Differentiable once in hidden, weight and
    bias, entropy included. `hidden`'s gradient is summed over `tp_group` here, nowhere else; the
    caller must not reduce it again. A weight under Megatron's DDP (it has `main_grad` and
    `grad_added_to_main_grad`) gets its gradient added to `main_grad` directly, as Megatron's own
    layers do under `gradient_accumulation_fusion`; `.grad` is then a placeholder.

    Every rank of `tp_group` must call it, also with N = 0 or without any real row.

    Raises ValueError for shapes and options that do not fit and, on the CPU, for labels out of
    range. On CUDA that check would wait for the device: there such a label yields -inf. Raises
    NotImplementedError for what is not built yet: `impl="triton"`, `cache_budget_bytes` above 0
    (forward's exponentials kept for backward) and second derivatives.
    """
    _check_operands(hidden, weight, labels, bias)
    _check_options(temperature, logit_softcap, cache_budget_bytes, impl)
    sharded = tp_group is not None and dist.get_world_size(tp_group) > 1
    vocab_size = _checked_vocab(vocab_start, vocab_size, len(weight), sharded)
    if labels.device.type == "cpu" and labels.numel():
        _check_labels(labels, vocab_size)
    head = Head(
        vocab_start=vocab_start,
        num_rows=min(max(vocab_size - vocab_start, 0), len(weight)),
        tp_group=tp_group if sharded else None,
        temperature=temperature,
        softcap=logit_softcap,
        with_entropy=return_entropy,
    )
    logps, entropy = linear_logprob_ref(hidden, weight, bias, labels, head)
    return (logps, entropy) if return_entropy else logps


def _check_operands(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> None:
    shapes = f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}"
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"{shapes}; expected (N, D) and (V, D)")
    floats = [t for t in (hidden, weight, bias) if t is not None]
    if not all(t.is_floating_point() for t in floats):
        raise ValueError(f"got {[str(t.dtype) for t in floats]}; expected floating point")
    if len({t.device for t in (*floats, labels)}) > 1:
        raise ValueError(f"got {[str(t.device) for t in (*floats, labels)]}; expected one device")
    if labels.shape != hidden.shape[:1] or labels.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"labels {tuple(labels.shape)} {labels.dtype}; expected ({len(hidden)},) int64 or int32"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias {tuple(bias.shape)}; expected ({len(weight)},)")


def _checked_vocab(vocab_start: int, vocab_size: int | None, num_rows: int, sharded: bool) -> int:
    if sharded and vocab_size is None:
        raise ValueError(
            "vocab_size is None; with a tp_group give the size of the whole vocabulary"
        )
    vocab_size = num_rows if vocab_size is None else vocab_size
    if vocab_size < 1 or vocab_start < 0:
        raise ValueError(f"vocab_size={vocab_size}, vocab_start={vocab_start}; expected >= 1, >= 0")
    if not sharded and (vocab_start != 0 or vocab_size > num_rows):
        raise ValueError(
            f"vocab_start={vocab_start}, vocab_size={vocab_size} with {num_rows} weight rows "
            "and no tp_group; expected vocab_start=0 and every real row; pass tp_group for a shard"
        )
    return vocab_size


def _check_options(temperature, logit_softcap, cache_budget_bytes, impl) -> None:
    if not temperature > 0 or (logit_softcap is not None and not logit_softcap > 0):
        raise ValueError(
            f"temperature={temperature}, logit_softcap={logit_softcap}; expected numbers above 0"
        )
    if cache_budget_bytes != 0:
        raise NotImplementedError(
            f"cache_budget_bytes={cache_budget_bytes}: the cached backward is not built yet; use 0"
        )
    if impl == "triton":
        raise NotImplementedError("impl='triton' is not built yet; use 'auto' or 'torch'")
    if impl not in ("auto", "torch"):
        raise ValueError(f"impl={impl!r}; expected 'auto', 'triton' or 'torch'")


def _check_labels(labels: Tensor, vocab_size: int) -> None:
    low, high = (int(value) for value in labels.aminmax())
    if low < 0 or high >= vocab_size:
        bad = low if low < 0 else high
        raise ValueError(
            f"label {bad} is outside the vocabulary of {vocab_size} ids; pass only rows with "
            "a real label (response tokens; there is no ignore index)"
        )
