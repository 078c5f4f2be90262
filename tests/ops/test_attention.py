"""Packed attention against attention of each segment alone, in float64, with all gradients."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from reinforcer_tp.mcore import attention, segments
from reinforcer_tp.mcore.attention import PackedAttention, packed_attention_params
from reinforcer_tp.mcore.grouped_attention import grouped_attention
from reinforcer_tp.mcore.segments import group_segments

HEAD_DIM = 16

# (prompt, chosen, rejected, shared) of each pair, and the tokens of padding behind them.
ROWS = {
    "padding only": ([], 5),
    "nothing shared": ([(5, 3, 9, 0), (1, 1, 1, 0)], 0),
    "shared prompts": ([(40, 31, 90, 40), (40, 30, 33, 40), (7, 60, 2, 7)], 3),
    "shared prefix": ([(6, 9, 7, 9), (5, 8, 8, 12), (3, 4, 4, 3)], 1),
    "prompt of one token": ([(1, 4, 7, 1), (1, 4, 7, 0), (1, 2, 2, 2)], 2),
    "responses of one token": ([(8, 1, 1, 8), (4, 1, 6, 4), (4, 6, 1, 4)], 0),
    "long beside short": ([(150, 70, 90, 150), (3, 200, 2, 3), (3, 4, 5, 3), (90, 110, 7, 0)], 40),
    # Tails of 110 x 330 and 113 x 326: short each, and padded to more than a short one may be.
    "padded past the border": ([(220, 1, 110, 220), (213, 1, 113, 213), (3, 1, 2, 3)], 0),
}


def row(pairs, padding: int) -> SimpleNamespace:
    """A packed row as data/packed_batch.py lays it out, token by token."""
    positions, kv_index, num_q, num_kv = [], [], [], []
    for prompt, chosen, rejected, shared in pairs:
        start = len(positions)
        positions += range(prompt + chosen)
        kv_index += range(start, len(positions))
        num_q.append(prompt + chosen)
        num_kv.append(prompt + chosen)
        tail = len(positions)
        positions += range(shared, prompt + rejected)
        kv_index += [*range(start, start + shared), *range(tail, len(positions))]
        num_q.append(len(positions) - tail)
        num_kv.append(prompt + rejected)
    if padding:
        kv_index += range(len(positions), len(positions) + padding)
        positions += range(padding)
        num_q.append(padding)
        num_kv.append(padding)
    is_plain = kv_index == list(range(len(positions)))
    return SimpleNamespace(
        position_ids=torch.tensor(positions),
        cu_seqlens_q=torch.tensor([0, *num_q]).cumsum(0).int(),
        cu_seqlens_kv=torch.tensor([0, *num_kv]).cumsum(0).int(),
        kv_index=None if is_plain else torch.tensor(kv_index),
        max_seqlen_q=max(num_q),
        max_seqlen_kv=max(num_kv),
    )


def inverse_frequencies(width: int) -> torch.Tensor:
    return 100.0 ** -(torch.arange(0, width, 2).float() / width)


def parameters(batch, heads, kv_heads, *, width=HEAD_DIM, device="cpu", has_kernel=False):
    return packed_attention_params(
        batch,
        inverse_frequencies=inverse_frequencies(width).to(device),
        rope_factor=1.0,
        has_kernel=has_kernel,
        num_heads=heads,
        num_kv_heads=kv_heads,
    )


def each_segment(batch, q, k, v, attend):
    """`attend(queries, keys, values)` of each segment, concatenated."""
    if batch.kv_index is not None:
        k, v = k[batch.kv_index.to(k.device)], v[batch.kv_index.to(k.device)]
    num_q, num_kv = (cu.diff().tolist() for cu in (batch.cu_seqlens_q, batch.cu_seqlens_kv))
    parts = zip(q.split(num_q), k.split(num_kv), v.split(num_kv), strict=True)
    return torch.cat([attend(*part) for part in parts])


def naive_attend(q, k, v):  # (n, H, E), (m, G, E), (m, G, E)
    keys, values = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhe,khe->hqk", q, keys) / math.sqrt(q.shape[-1])
    last_seen = torch.arange(len(q), device=q.device) + len(k) - len(q)
    hidden = torch.arange(len(k), device=q.device) > last_seen[:, None]
    return torch.einsum("hqk,khe->qhe", scores.masked_fill(hidden, -math.inf).softmax(-1), values)


def sdpa_attend(q, k, v):
    """torch's own in the tensors' dtype: what says how much error is usual."""
    visible = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).tril(len(k) - len(q))
    heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(*heads_first, attn_mask=visible, enable_gqa=True)
    return out[0].transpose(0, 1)


def naive(batch, q, k, v):
    """Rope as a rotation of complex numbers, then each segment alone, in float64."""
    angles = batch.position_ids.double()[:, None] * inverse_frequencies(q.shape[-1])
    turn = torch.polar(torch.ones_like(angles), angles)[:, None].to(q.device)

    def rotate(x):
        turned = torch.complex(*x.double().chunk(2, dim=-1)) * turn
        return torch.cat((turned.real, turned.imag), dim=-1)

    return each_segment(batch, rotate(q), rotate(k), v.double(), naive_attend).flatten(1)


def inputs(batch, heads, kv_heads, *, dtype, device="cpu", width=HEAD_DIM):
    generator = torch.Generator().manual_seed(0)
    total = len(batch.position_ids)
    tensors = [
        torch.randn(total, n, width, generator=generator).to(device, dtype).requires_grad_()
        for n in (heads, kv_heads, kv_heads)
    ]
    return tensors, torch.randn(total, heads, width, generator=generator).to(device, dtype)


def module(batch, tensors, params):
    core = PackedAttention(SimpleNamespace(), 1, None, "self")
    return core(*(t[:, None] for t in tensors), None, packed_seq_params=params)[:, 0]


def with_gradients(out, tensors, upstream):
    upstream = upstream.reshape(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, tensors, upstream)]


def worst(got, right):
    return (got.double() - right.double()).abs().max()


ALL_ROWS = pytest.mark.parametrize("name", ROWS)
ALL_HEADS = pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (9, 3), (2, 1)])


@ALL_ROWS
@ALL_HEADS
def test_float64_equals_each_segment_alone(name, heads, kv_heads):
    batch = row(*ROWS[name])
    tensors, upstream = inputs(batch, heads, kv_heads, dtype=torch.float64)
    ours = module(batch, tensors, parameters(batch, heads, kv_heads))
    got = with_gradients(ours, tensors, upstream)
    right = with_gradients(naive(batch, *tensors), tensors, upstream)
    for mine, expected in zip(got, right, strict=True):
        # cos and sin are float32: that is all the difference there is.
        torch.testing.assert_close(mine, expected, rtol=2e-5, atol=2e-5)


@ALL_ROWS
@pytest.mark.parametrize("sharpness", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_error_is_near_that_of_sdpa_segment_by_segment(name, dtype, sharpness):
    """Without rope, which would add the same error to both."""
    batch = row(*ROWS[name])
    tensors, upstream = inputs(batch, 9, 3, dtype=dtype, width=64)
    with torch.no_grad():
        tensors[0] *= sharpness  # 5: one key in a segment takes most of the weight
    plan = parameters(batch, 9, 3).segments
    right = with_gradients_in_float64(batch, tensors, upstream)
    got = with_gradients(grouped_attention(*tensors, plan), tensors, upstream)
    usual = with_gradients(each_segment(batch, *tensors, sdpa_attend), tensors, upstream)
    for mine, plain, expected in zip(got, usual, right, strict=True):
        assert (mine - expected).norm() <= 1.5 * (plain - expected).norm()
        # The single worst number of a few hundred is a matter of luck within some roundings.
        # (2.3 times SDPA's own on a Xeon whose products sum in another order than an EPYC's.)
        few_roundings = 2 * torch.finfo(dtype).eps * expected.abs().max()
        assert worst(mine, expected) <= max(3 * worst(plain, expected), few_roundings)


def with_gradients_in_float64(batch, tensors, upstream):
    wide = [t.detach().double().requires_grad_() for t in tensors]
    return with_gradients(each_segment(batch, *wide, naive_attend), wide, upstream)


@ALL_ROWS
def test_gradients_repeat_to_the_bit(name):
    batch = row(*ROWS[name])
    tensors, upstream = inputs(batch, 9, 3, dtype=torch.float32)
    params = parameters(batch, 9, 3)
    first, *others = (
        with_gradients(module(batch, tensors, params), tensors, upstream) for _ in range(4)
    )
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("poison", ["the row's padding", "padded slots"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_stands_in_padding_does_not_matter(dtype, poison, monkeypatch):
    """To the bit. Nor does what memory held before: new tensors are NaN."""
    padding = 7
    pairs = [(40, 31, 90, 40), (40, 33, 86, 40), (150, 80, 70, 150), (160, 75, 75, 160)]
    batch = row(pairs, padding)
    tensors, upstream = inputs(batch, 2, 1, dtype=dtype)
    plan = parameters(batch, 2, 1).segments
    assert all(any(g.num_segments > 1 for g in groups) for groups in (plan.short, plan.long))
    clean = with_gradients(grouped_attention(*tensors, plan), tensors, upstream)
    with torch.no_grad():
        for t in tensors:  # a slot's value may be anything finite, the row's padding anything
            t[-padding:] = torch.nan if poison == "the row's padding" else 1e4
    if poison == "padded slots":
        plan = dataclasses.replace(
            plan, queries=padding_from_last_row(plan.queries), keys=padding_from_last_row(plan.keys)
        )
    real_empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda x: real_empty_like(x).fill_(torch.nan))
    dirty = with_gradients(grouped_attention(*tensors, plan), tensors, upstream)
    for before, after in zip(clean, dirty, strict=True):
        assert torch.equal(before[:-padding], after[:-padding])


def padding_from_last_row(plan):
    is_real = torch.zeros(len(plan.index), dtype=torch.bool)
    for _, slots in plan.copies:
        is_real[slots] = True
    assert not is_real.all()
    return dataclasses.replace(plan, index=torch.where(is_real, plan.index, plan.index.max()))


@ALL_ROWS
def test_groups_hold_each_segment_once_and_little_padding(name):
    batch = row(*ROWS[name])
    plan = group_segments(
        batch.cu_seqlens_q, batch.cu_seqlens_kv, batch.kv_index, num_heads=4, num_kv_heads=2
    )
    num_q, num_kv = (cu.diff() for cu in (batch.cu_seqlens_q, batch.cu_seqlens_kv))
    groups = plan.short + plan.long
    assert sum(group.num_segments for group in groups) == len(num_q)
    padded = sum(g.num_segments * g.num_queries * g.num_keys for g in groups)
    assert int((num_q * num_kv).sum()) >= segments._MIN_FILL * padded
    rows = torch.cat([slots for slots, _ in plan.outputs.copies])
    assert torch.equal(plan.queries.index[rows], torch.arange(4 * len(batch.position_ids)))
    assert bool(plan.long) == (name in ("long beside short", "padded past the border"))


def test_segments_without_queries_are_left_out():
    cu_seqlens = torch.tensor([0, 0, 3, 3, 6, 6], dtype=torch.int32)
    plan = group_segments(cu_seqlens, cu_seqlens, None, num_heads=1, num_kv_heads=1)
    [group] = plan.short
    assert (group.num_segments, group.num_queries, group.num_keys) == (2, 3, 3)
    assert plan.queries.index.tolist() == plan.keys.index.tolist() == [0, 1, 2, 3, 4, 5]


def test_scores_of_a_group_are_bounded():
    """64 segments of 90 tokens and 9 heads would hold 18 MiB of float32 at once."""
    cu_seqlens = torch.arange(65, dtype=torch.int32) * 90
    plan = group_segments(cu_seqlens, cu_seqlens, None, num_heads=9, num_kv_heads=3)
    most = max(9 * g.num_segments * g.num_queries * g.num_keys for g in plan.short)
    assert 2**17 < most <= 2**18


def varlen_as_documented(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
    """FlashAttention's contract, in the caller's dtype: query i of n sees the keys j of m with
    i + m - n - left <= j <= i + m - n + right, a bound of -1 being none."""
    assert window_size == (-1, 0) and scale is None
    assert enable_gqa == (q.shape[1] != k.shape[1])
    assert (cu_q.dtype, cu_k.dtype) == (torch.int32, torch.int32)
    assert (max_q, max_k) == (int(cu_q.diff().max()), int(cu_k.diff().max()))
    assert (len(q), len(k), len(v)) == (cu_q[-1], cu_k[-1], cu_k[-1])
    batch = SimpleNamespace(cu_seqlens_q=cu_q, cu_seqlens_kv=cu_k, kv_index=None)
    return each_segment(batch, q, k, v, naive_attend)


@ALL_ROWS
@ALL_HEADS
def test_the_varlen_call_means_each_segment_alone(name, heads, kv_heads, monkeypatch):
    """What the kernel is given, judged on the CPU by its documented meaning."""
    monkeypatch.setattr(attention, "varlen_attn", varlen_as_documented)
    batch = row(*ROWS[name])
    tensors, upstream = inputs(batch, heads, kv_heads, dtype=torch.float64)
    params = parameters(batch, heads, kv_heads, has_kernel=True)
    assert params.segments is None and (params.keys is None) == (batch.kv_index is None)
    got = with_gradients(module(batch, tensors, params), tensors, upstream)
    right = with_gradients(naive(batch, *tensors), tensors, upstream)
    for mine, expected in zip(got, right, strict=True):
        torch.testing.assert_close(mine, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@ALL_ROWS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_varlen_kernel_equals_each_segment_alone(name, dtype):
    """Judged by the error of the padded batches in this dtype."""
    batch = row(*ROWS[name])
    tensors, upstream = inputs(batch, 6, 2, dtype=dtype, device="cuda", width=64)
    kernel = parameters(batch, 6, 2, width=64, device="cuda", has_kernel=True)
    plain = parameters(batch, 6, 2, width=64, device="cuda")
    right = with_gradients(naive(batch, *tensors), tensors, upstream)
    usual = with_gradients(module(batch, tensors, plain), tensors, upstream)
    got = with_gradients(module(batch, tensors, kernel), tensors, upstream)
    for mine, other, expected in zip(got, usual, right, strict=True):
        assert worst(mine, expected) <= 2 * worst(other, expected) + 1e-3
