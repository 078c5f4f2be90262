"""Packed attention for Megatron's `SelfAttention`: rope by the batch's positions, causal segments.

Legend: T packed tokens (one row), K key slots of its segments, H query heads and G key-value heads
of this rank, E head dim.

The queries of a segment are a consecutive stretch of the row. Its keys are the rows that `kv_index`
names, the same stretch at their end: what stands before it is shared with an earlier segment.
"""

from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from reinforcer_tp.data.packed_batch import PackedBatch, move
from reinforcer_tp.mcore.gather import Gather, gather_plan, gather_rows
from reinforcer_tp.mcore.grouped_attention import grouped_attention
from reinforcer_tp.mcore.segments import GroupedSegments, group_segments


@dataclass(kw_only=True)
class PackedAttentionParams(PackedSeqParams):
    """Everything attention needs of one micro-batch.

    A `PackedSeqParams`, because that is what Megatron hands through pipeline stages and recompute
    together with the activations they belong to. `qkv_format` stays None: "thd" would make
    Megatron squeeze the batch dimension and apply its own per-sequence rope.
    """

    cos: Tensor  # (T, E) float32
    sin: Tensor  # (T, E) float32
    keys: Gather | None  # K rows of the T; None where nothing is shared, or `segments` says it
    segments: GroupedSegments | None  # None where the varlen kernel runs


def packed_attention_params(
    batch: PackedBatch,  # on the host
    *,
    inverse_frequencies: Tensor,  # (E/2,) float32; its device is where attention runs
    rope_factor: float,
    has_kernel: bool,  # the varlen kernel runs on that device and dtype
    num_heads: int,  # H
    num_kv_heads: int,  # G
) -> PackedAttentionParams:
    """Rope tables and segments of one micro-batch, on the model's device."""
    device = inverse_frequencies.device
    position_ids = move(batch.position_ids.float(), device)
    angles = position_ids[:, None] * inverse_frequencies
    angles = torch.cat((angles, angles), dim=-1)  # (T, E)
    keys = segments = None
    if not has_kernel:
        segments = group_segments(
            batch.cu_seqlens_q,
            batch.cu_seqlens_kv,
            batch.kv_index,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            device=device,
        )
    elif batch.kv_index is not None:
        keys = gather_plan(batch.kv_index).to(device)
    return PackedAttentionParams(
        cos=angles.cos() * rope_factor,
        sin=angles.sin() * rope_factor,
        cu_seqlens_q=move(batch.cu_seqlens_q, device),
        cu_seqlens_kv=move(batch.cu_seqlens_kv, device),
        max_seqlen_q=batch.max_seqlen_q,
        max_seqlen_kv=batch.max_seqlen_kv,
        keys=keys,
        segments=segments,
    )


class _Rope(torch.autograd.Function):
    """Rotates by the position's angle; backward rotates back, so only cos and sin are kept."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.dtype = x.dtype
        return _rotate(x, cos, sin, 1).to(dtype)  # (T, H, E)

    @staticmethod
    def backward(ctx, grad: Tensor):
        # The halves of sin are equal, so the transpose of the rotation is the rotation by -angle.
        return _rotate(grad, *ctx.saved_tensors, -1).to(ctx.dtype), None, None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """x cos + (-second half, first half) sin, in float32. A pass over memory less an operation."""
    half = x.shape[-1] // 2
    x, sin = x.to(torch.promote_types(x.dtype, cos.dtype)), sin[:, None, :half]
    out = x * cos[:, None]
    out[..., :half].addcmul_(x[..., half:], sin, value=-sign)
    out[..., half:].addcmul_(x[..., :half], sin, value=sign)
    return out


class PackedAttention(torch.nn.Module):
    """Core attention of Megatron's `SelfAttention` (ModuleSpec); has no parameters.

    On CUDA in bfloat16 and float16 it is the varlen kernel, elsewhere padded batches of segments
    of similar length. Transformer Engine's attention is no choice beside it: for packed rows
    Megatron's wrapper asks it for "padding_causal", aligned top-left, and a segment's queries are
    the tail of its keys.
    """

    def __init__(self, config, layer_number: int, attn_mask_type, attention_type: str, **unused):
        super().__init__()
        assert attention_type == "self", attention_type
        self.softmax_scale = unused.get("softmax_scale")

    def forward(
        self,
        query: Tensor,  # (T, 1, H, E)
        key: Tensor,  # (T, 1, G, E)
        value: Tensor,  # (T, 1, G, E)
        attention_mask: None,
        attn_mask_type=None,
        attention_bias: None = None,
        packed_seq_params: PackedAttentionParams | None = None,
    ) -> Tensor:  # (T, 1, H * E)
        assert attention_mask is None and attention_bias is None, "masks come from the segments"
        params, dtype = packed_seq_params, query.dtype
        if params.segments is not None:
            # Without the kernel half tensors cost time: their products round, and SDPA's backward
            # is slower for them on a CPU. Rope makes float32 anyway.
            dtype = torch.promote_types(dtype, torch.float32)
        q = _Rope.apply(query.squeeze(1), params.cos, params.sin, dtype)
        k = _Rope.apply(key.squeeze(1), params.cos, params.sin, dtype)
        v = value.squeeze(1).to(dtype)
        if params.segments is None:
            out = _varlen_attention(q, k, v, params, self.softmax_scale)
        else:
            out = grouped_attention(q, k, v, params.segments, self.softmax_scale)
        return out.reshape(out.shape[0], 1, -1).to(query.dtype)


def _varlen_attention(q, k, v, params: PackedAttentionParams, scale: float | None) -> Tensor:
    if params.keys is not None:
        k, v = gather_rows(k, params.keys), gather_rows(v, params.keys)
    return varlen_attn(
        q,
        k,
        v,
        params.cu_seqlens_q,
        params.cu_seqlens_kv,
        params.max_seqlen_q,
        params.max_seqlen_kv,
        scale=scale,
        window_size=(-1, 0),  # causal, aligned bottom-right
        enable_gqa=q.shape[1] != k.shape[1],
    )
