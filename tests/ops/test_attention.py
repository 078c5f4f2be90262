"""Packed attention against attention of each segment alone, in float64, with gradients."""

import math
from types import SimpleNamespace

import pytest
import torch

from reinforcer_tp.mcore.attention import PackedAttention, PackedAttentionParams, segment_groups

LENGTHS = [
    [1],
    [7, 7, 7],
    [1, 2, 3, 4, 5, 60, 2],
    [33, 1, 90, 31, 30, 89],
]


def rope_tables(lengths: list[int], head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    positions = torch.cat([torch.arange(n) for n in lengths]).double()
    frequencies = 100.0 ** -(torch.arange(0, head_dim, 2).double() / head_dim)
    angles = torch.cat([positions[:, None] * frequencies] * 2, dim=-1)
    return angles.cos().float(), angles.sin().float()


def naive(q, k, v, lengths, cos, sin):
    """Softmax attention of each segment by itself; rope as a rotation of complex numbers."""

    def rotate(x):
        real, imaginary = x.double().chunk(2, dim=-1)
        half = cos.shape[-1] // 2
        turn = torch.complex(cos.double()[:, None, :half], sin.double()[:, None, :half])
        turned = torch.complex(real, imaginary) * turn
        return torch.cat((turned.real, turned.imag), dim=-1)

    q, k, v = rotate(q), rotate(k), v.double()
    repeat = q.shape[1] // k.shape[1]
    outs, begin = [], 0
    for length in lengths:
        part = slice(begin, begin + length)
        begin += length
        keys = k[part].repeat_interleave(repeat, dim=1)
        values = v[part].repeat_interleave(repeat, dim=1)
        scores = torch.einsum("qhe,khe->hqk", q[part], keys) / math.sqrt(q.shape[-1])
        future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
        weights = scores.masked_fill(future, -math.inf).softmax(-1)
        outs.append(torch.einsum("hqk,khe->qhe", weights, values).flatten(1))
    return torch.cat(outs)


def packed(lengths, cos, sin, *, with_groups: bool, device="cpu") -> PackedAttentionParams:
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    return PackedAttentionParams(
        cos=cos.to(device),
        sin=sin.to(device),
        cu_seqlens_q=cu_seqlens.to(device),
        cu_seqlens_kv=cu_seqlens.to(device),
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
        groups=segment_groups(cu_seqlens) if with_groups else None,
    )


def run(lengths, heads, groups, *, dtype, device, with_groups):
    """(output, gradients) of ours, and the same of the naive form on the same values."""
    generator = torch.Generator().manual_seed(0)
    total, head_dim = sum(lengths), 16
    tensors = [
        torch.randn(total, n, head_dim, generator=generator).to(device, dtype).requires_grad_()
        for n in (heads, groups, groups)
    ]
    upstream = torch.randn(total, heads * head_dim, generator=generator).to(device)
    cos, sin = rope_tables(lengths, head_dim)
    attention = PackedAttention(SimpleNamespace(), 1, None, "self")
    params = packed(lengths, cos, sin, with_groups=with_groups, device=device)
    out = attention(*(t[:, None] for t in tensors), None, packed_seq_params=params)[:, 0]
    grads = torch.autograd.grad((out.float() * upstream).sum(), tensors)
    expected = naive(*tensors, lengths, cos.to(device), sin.to(device))
    expected_grads = torch.autograd.grad((expected * upstream.double()).sum(), tensors)
    return (out, *grads), (expected, *expected_grads)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2)])
def test_grouped_segments_equal_each_segment_alone(lengths, heads, groups):
    ours, expected = run(
        lengths, heads, groups, dtype=torch.float32, device="cpu", with_groups=True
    )
    for mine, right in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine.double(), right.double(), rtol=2e-5, atol=5e-6)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_groups_cover_every_token_once(lengths):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    groups = segment_groups(cu_seqlens)
    rows = torch.cat([g.rows for g in groups])
    assert rows.sort().values.tolist() == list(range(sum(lengths)))
    for group in groups:
        assert torch.equal(group.gather.flatten()[group.slots], group.rows)


def test_an_empty_segment_is_left_out():
    [group] = segment_groups(torch.tensor([0, 3, 3, 6], dtype=torch.int32))
    assert group.gather.tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_varlen_kernel_equals_each_segment_alone(lengths, dtype):
    """Judged by the error of the same attention through SDPA in this dtype."""
    ours, expected = run(lengths, 6, 2, dtype=dtype, device="cuda", with_groups=False)
    plain, _ = run(lengths, 6, 2, dtype=dtype, device="cuda", with_groups=True)
    for mine, other, right in zip(ours, plain, expected, strict=True):
        bar = 2 * (other.double() - right.double()).abs().max() + 1e-3
        assert (mine.double() - right.double()).abs().max() <= bar
