"""Packed attention for Megatron's `SelfAttention`: rope by the batch's positions, causal segments.

Legend: T packed tokens (one row), H query heads and G key-value heads of this rank, E head dim,
S segments. Segments are consecutive stretches of the row; a token sees its own segment only.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

# A group of segments is padded to its longest; a segment joins when it fills at least this share.
_MIN_FILL = 0.75


@dataclass(kw_only=True)
class PackedAttentionParams(PackedSeqParams):
    """Everything attention needs of one micro-batch.

    A `PackedSeqParams`, because that is what Megatron hands through pipeline stages and recompute
    together with the activations they belong to. `qkv_format` stays None: "thd" would make
    Megatron squeeze the batch dimension and apply its own per-sequence rope.
    """

    cos: Tensor  # (T, E) float32
    sin: Tensor  # (T, E) float32
    # Per group of segments of similar length: row index of each padded position, and the padded
    # position of each row (both int64). None where the varlen kernel runs.
    groups: tuple["SegmentGroup", ...] | None


@dataclass(frozen=True, kw_only=True)
class SegmentGroup:
    """Segments of similar length as one padded batch."""

    gather: Tensor  # (S_g, L) int64: token index; padding repeats a token of the same segment
    rows: Tensor  # (T_g,) int64: the tokens of these segments
    slots: Tensor  # (T_g,) int64: where those tokens stand in the flattened (S_g * L)


def segment_groups(
    cu_seqlens: Tensor, device: torch.device | str = "cpu"
) -> tuple[SegmentGroup, ...]:
    """Groups segments of similar length, on `device`. `cu_seqlens` (S + 1,) integers on the CPU."""
    lengths = cu_seqlens.diff()
    order = torch.argsort(lengths, descending=True, stable=True).tolist()
    batches: list[list[int]] = []
    for segment in order:
        length = int(lengths[segment])
        if length == 0:
            continue
        if batches and length >= _MIN_FILL * int(lengths[batches[-1][0]]):
            batches[-1].append(segment)
        else:
            batches.append([segment])
    return tuple(_segment_group(cu_seqlens, lengths, batch, device) for batch in batches)


def _segment_group(
    cu_seqlens: Tensor, lengths: Tensor, segments: list[int], device: torch.device | str
) -> SegmentGroup:
    index = torch.tensor(segments)
    start, length = cu_seqlens[index].long(), lengths[index].long()
    longest = int(length.max())
    offset = torch.arange(longest).expand(len(segments), longest)
    is_real = offset < length[:, None]
    gather = start[:, None] + torch.minimum(offset, length[:, None] - 1)
    return SegmentGroup(
        gather=gather.to(device),
        rows=gather[is_real].to(device),
        slots=is_real.flatten().nonzero().squeeze(1).to(device),
    )


class _Rope(torch.autograd.Function):
    """Rotates by the position's angle; backward rotates back, so only cos and sin are kept."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # x: (T, H, E)
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx, grad: Tensor):
        cos, sin = ctx.saved_tensors
        # The halves of sin are equal, so the transpose of the rotation is the rotation by -angle.
        return _rotate(grad, cos, -sin), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return (x * cos[:, None] + rotated * sin[:, None]).to(x.dtype)


class PackedAttention(torch.nn.Module):
    """Core attention of Megatron's `SelfAttention` (ModuleSpec); has no parameters.

    On CUDA in bfloat16 and float16 it is the varlen kernel, elsewhere scaled_dot_product_attention
    over groups of segments of similar length.
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
        params = packed_seq_params
        q = _Rope.apply(query.squeeze(1), params.cos, params.sin)
        k = _Rope.apply(key.squeeze(1), params.cos, params.sin)
        v = value.squeeze(1)
        if params.groups is None:
            out = varlen_attn(
                q,
                k,
                v,
                params.cu_seqlens_q,
                params.cu_seqlens_kv,
                params.max_seqlen_q,
                params.max_seqlen_kv,
                scale=self.softmax_scale,
                window_size=(-1, 0),  # causal, aligned bottom-right
                enable_gqa=q.shape[1] != k.shape[1],
            )
        else:
            out = _grouped_sdpa(q, k, v, params.groups, self.softmax_scale)
        return out.reshape(out.shape[0], 1, -1)


def _grouped_sdpa(q, k, v, groups: tuple[SegmentGroup, ...], scale: float | None) -> Tensor:
    """One call per group. Padding stands after the real tokens, so causality hides it from them."""
    outs, rows = [], []
    for group in groups:
        padded_q, padded_k, padded_v = (
            x[group.gather].transpose(1, 2)
            for x in (q, k, v)  # (S_g, heads, L, E)
        )
        out = F.scaled_dot_product_attention(
            padded_q, padded_k, padded_v, is_causal=True, scale=scale, enable_gqa=True
        )
        outs.append(out.transpose(1, 2).flatten(0, 1)[group.slots])
        rows.append(group.rows)
    return torch.empty_like(q).index_copy(0, torch.cat(rows), torch.cat(outs))
