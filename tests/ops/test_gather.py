"""Deterministic gathers against autograd of plain indexing, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reinforcer_tp.mcore.gather import gather_plan, gather_rows


def gradient(x, out, upstream):
    return torch.autograd.grad((out * upstream).sum(), x)[0]


@st.composite
def cases(draw):
    num_rows = draw(st.integers(1, 12))
    index = draw(st.lists(st.integers(0, num_rows - 1), max_size=40))
    is_real = draw(st.lists(st.booleans(), min_size=len(index), max_size=len(index)))
    width = draw(st.sampled_from([(), (1,), (3, 2)]))
    return num_rows, index, draw(st.sampled_from([None, is_real])), width


@settings(max_examples=200, deadline=None)
@given(cases())
def test_a_gather_equals_plain_indexing_with_the_gradient_of_padding_dropped(case):
    num_rows, index, is_real, width = case
    index = torch.tensor(index, dtype=torch.int64)
    real = torch.ones(len(index)) if is_real is None else torch.tensor(is_real).double()
    plan = gather_plan(index, None if is_real is None else torch.tensor(is_real).bool())
    x = torch.randn(num_rows, *width, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(len(index), *width, dtype=torch.float64)
    out, plain = gather_rows(x, plan), x[index]
    assert torch.equal(out, plain)
    masked = upstream * real.reshape(-1, *(1 for _ in width))
    # The sum of a row's slots, in another order.
    torch.testing.assert_close(
        gradient(x, out, upstream), gradient(x, plain, masked), rtol=1e-13, atol=1e-13
    )


@settings(max_examples=200, deadline=None)
@given(cases())
def test_levels_hold_each_real_slot_once_and_no_row_twice(case):
    _, index, is_real, _ = case
    is_real = [True] * len(index) if is_real is None else is_real
    index = torch.tensor(index, dtype=torch.int64)
    plan = gather_plan(index, torch.tensor(is_real).bool())
    slots = torch.cat([torch.empty(0, dtype=torch.int64), *(slots for _, slots in plan.copies)])
    assert sorted(slots.tolist()) == [slot for slot, real in enumerate(is_real) if real]
    for rows, slots in plan.copies:
        assert len(set(rows.tolist())) == len(rows) > 0
        assert torch.equal(index[slots], rows)


def test_a_not_a_number_in_the_gradient_of_padding_reaches_no_row():
    plan = gather_plan(torch.tensor([2, 0, 2, 2]), torch.tensor([True, True, False, True]))
    x = torch.zeros(3, 1, requires_grad=True)
    upstream = torch.tensor([[1.0], [2.0], [torch.nan], [4.0]])
    assert gradient(x, gather_rows(x, plan), upstream).tolist() == [[2.0], [0.0], [5.0]]


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
            ],
        ),
    ],
)
def test_gradients_are_sums_in_the_order_of_the_slots_to_the_bit(device):
    """Values of very different size: another order of the sum would give other bits."""
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(0, 50, (1000,), generator=generator)
    exponents = torch.randint(-4, 4, (1000, 1), generator=generator)
    upstream = torch.randn(1000, 8, generator=generator) * 10.0**exponents
    in_order = torch.zeros(50, 8)
    for row, values in zip(index.tolist(), upstream, strict=True):
        in_order[row] += values
    plan = gather_plan(index).to(device)
    x = torch.zeros(50, 8, device=device, requires_grad=True)
    got = gradient(x, gather_rows(x, plan), upstream.to(device))
    assert torch.equal(got.cpu(), in_order)
