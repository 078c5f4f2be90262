"""What the Triton operator costs: products, bytes, and addresses beyond 2^31."""

from __future__ import annotations

import weakref
from contextlib import contextmanager

import pytest
import torch
import triton
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary

import kernels.collectives
import kernels.linear_logprob
from kernels import linear_logprob_triton, vocab_parallel_linear_logprob
from kernels.blocks import BLOCK_TABLE, Blocks
from tests.ops.dense import error
from tests.ops.triton_cases import (
    DEVICE,
    EVERYTHING,
    expect,
    make,
    poisoned_memory,  # noqa: F401 - applies to every test
    recorded_launches,
    run,
    untouched,
    use_blocks,
)

# Of torch, for a fake tensor's address, on which the launcher looks at its alignment.
pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
interpreter_only = pytest.mark.skipif(DEVICE == "cuda", reason="counts in Triton's interpreter")
MIB = 2**20


@interpreter_only
@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize(("budget", "products"), [(0, 8), (EVERYTHING, 6)])
def test_executed_products(descriptors, budget, products, monkeypatch):
    """Every tl.dot and every library GEMM, at sizes that the tiles divide."""
    from triton.runtime.interpreter import InterpreterBuilder

    n, d, v = 128, 64, 512
    blocks = Blocks(block_n=32, block_v=128, block_d=32, descriptors=descriptors)
    use_blocks(monkeypatch, blocks)
    dot, counted = InterpreterBuilder.create_dot, []

    def counting(self, a, b, *rest):
        counted.append(2 * a.data.shape[0] * a.data.shape[1] * b.data.shape[1])
        return dot(self, a, b, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", counting)
    operands, labels, grad, _ = make(n, d, v)
    with FlopCounterMode(display=False) as library:
        run(operands, labels, grad, cache_budget_bytes=budget)
    assert sum(counted) + library.get_total_flops() == products * n * d * v


class LiveBytes(TorchDispatchMode):
    """Bytes of tensors made inside it that live at once: now, and at most."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.seen = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        self.seen.update({x.untyped_storage(): None for x in known})
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage() not in self.seen:
                storage = x.untyped_storage()
                self.seen[storage] = None
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, storage.nbytes())
        return out

    def free(self, num_bytes):
        self.now -= num_bytes


def gpu_product(out, a, b, *, accumulate, **_):
    """What kernels.gemm does on CUDA; a CPU's GEMM would first make a result in half precision."""
    keyword = {} if a.dtype == out.dtype else {"out_dtype": out.dtype}
    torch.addmm(out, a, b, beta=int(accumulate), out=out, **keyword)


@contextmanager
def as_on_h100(monkeypatch):
    """The launchers' decisions and allocations of an H100, with tensors that hold nothing."""
    changes = {
        "INTERPRETED": False,
        "check_operands": lambda *_: None,
        "architecture": lambda _: 90,
        "num_sms": lambda _: 132,
    }
    for name, value in changes.items():
        monkeypatch.setattr(linear_logprob_triton, name, value)
    with FakeTensorMode(), recorded_launches(execute=False) as launches:
        yield launches


LLAMA_8B = (8192, 4096, 128256)
LLAMA_70B_TP8 = (8192, 8192, 16032)
SMOLLM2 = (4096, 576, 49152)


def fake_operands(n, d, v):
    hidden = torch.empty(n, d, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.empty(v, d, dtype=torch.bfloat16, requires_grad=True)
    return hidden, weight, torch.empty(n, dtype=torch.int64)


def launched_products(launches) -> int:
    """2 N D V of all tiles, with what the last ones compute past the edges of N, D and V."""
    total = 0
    for name in ("linear_logprob_fwd_kernel", "linear_logprob_bwd_kernel"):
        for grid, (n, v, d, *_), flags in launches[name]:
            tiles = triton.cdiv(n, flags["BLOCK_N"]) * triton.cdiv(v, flags["BLOCK_V"])
            assert grid == (min(tiles, 132) if flags["DESCRIPTORS"] else tiles)
            tile = flags["BLOCK_N"] * flags["BLOCK_V"]
            total += 2 * tiles * tile * triton.cdiv(d, flags["BLOCK_D"]) * flags["BLOCK_D"]
    return total


SHAPES = pytest.mark.parametrize(
    "shape", [LLAMA_8B, LLAMA_70B_TP8, SMOLLM2], ids=["llama8b", "llama70b-tp8", "smollm2"]
)


@SHAPES
@pytest.mark.parametrize(("budget", "products"), [(0, 8), (EVERYTHING, 6)])
def test_products_of_real_shapes(shape, budget, products, monkeypatch):
    n, d, v = shape
    with as_on_h100(monkeypatch) as launches, FlopCounterMode(display=False) as library:
        hidden, weight, labels = fake_operands(*shape)
        logps = launch(hidden, weight, labels, budget)
        logps.backward(torch.empty(n))
    total = launched_products(launches) + library.get_total_flops()
    assert total == pytest.approx(products * n * d * v, rel=0.02)


def launch(hidden, weight, labels, budget=0):
    return vocab_parallel_linear_logprob(
        hidden, weight, labels, cache_budget_bytes=budget, check_labels=False, impl="triton"
    )


def tile_statistics(n, d, v) -> int:
    """Anchor and sum of each row and slice, in bytes."""
    blocks = BLOCK_TABLE[90, "small" if d <= 1024 else "large"]
    return 8 * n * triton.cdiv(v, blocks.block_v) * blocks.slices


@pytest.fixture
def gpu_products(monkeypatch):
    for module in (kernels.linear_logprob, kernels.collectives):
        monkeypatch.setattr(module, "add_product", gpu_product)


@SHAPES
def test_bytes_of_a_forward_without_gradient(shape, monkeypatch):
    with as_on_h100(monkeypatch):
        operands = fake_operands(*shape)
        with torch.no_grad(), LiveBytes() as live:
            logps = launch(*operands)
    assert live.peak <= tile_statistics(*shape) + 16 * shape[0]
    assert live.peak > tile_statistics(*shape)  # the measure sees them
    del logps
    assert live.now == 0


@SHAPES
@pytest.mark.parametrize("budget", [0, 100 * MIB, 1024 * MIB])
@pytest.mark.usefixtures("gpu_products")
def test_bytes_of_forward_and_backward(shape, budget, monkeypatch):
    n, d, v = shape
    with as_on_h100(monkeypatch):
        hidden, weight, labels = fake_operands(*shape)
        upstream = torch.empty(n)
        with LiveBytes() as live:
            logps = launch(hidden, weight, labels, budget)
            kept = live.now
            grads = torch.autograd.grad(logps, (hidden, weight), upstream)
    per_token = 64 * n  # statistics and factors of the rows
    assert kept <= budget + per_token
    returned = sum(x.nbytes for x in grads)
    dhidden = 4 * n * d  # float32 until all is summed
    statistics = tile_statistics(*shape)  # gone before backward
    peak = max(256 * MIB + dhidden + returned, statistics)
    assert live.peak <= budget + peak + per_token
    if budget:  # as many whole tiles of columns as fit are kept
        assert kept > min(budget, 2 * n * v) - 3 * n * 256


STRIDE = 2**24 + 64  # 129 rows of this many floats reach past 2^31
ROWS = 130


def far_rows(shape):
    """A matrix whose last rows lie beyond 2^31 elements, of which only its columns are touched."""
    return untouched(STRIDE * ROWS).as_strided(shape, (STRIDE, 1))


@pytest.fixture
def tall_tiles(monkeypatch):
    use_blocks(monkeypatch, Blocks(block_n=64, block_v=64, block_d=32, num_warps=4, num_stages=2))


@pytest.mark.usefixtures("tall_tiles")
@pytest.mark.parametrize("name", ["hidden", "weight"])
def test_operands_beyond_2_to_the_31(name):
    operands, labels, grad, _ = make(ROWS, 16, ROWS)
    expected = expect(operands, labels, grad)
    far = far_rows((ROWS, 16))
    far.copy_(operands[name].detach())
    assert far.stride(0) * (ROWS - 1) > 2**31
    operands[name] = far.requires_grad_()
    logps, _, grads = run(operands, labels, grad)
    torch.testing.assert_close(logps.double(), expected.logps, rtol=1e-6, atol=1e-5)
    for key, value in grads.items():
        assert error(value, expected.grads[key]) <= 2e-5, key


@pytest.mark.usefixtures("tall_tiles")
@pytest.mark.parametrize("budget", [0, EVERYTHING], ids=["dz", "E"])
def test_dz_and_exponentials_beyond_2_to_the_31(budget, monkeypatch):
    """The only (N, V) buffers, with rows as far apart as if V were 2^24."""
    operands, labels, grad, _ = make(ROWS, 16, 100)
    expected = expect(operands, labels, grad)
    new_empty, made = torch.Tensor.new_empty, []

    def far_apart(self, *size, **options):
        if len(size) != 2 or not size[1]:
            return new_empty(self, *size, **options)
        made.append(far_rows(size))
        return made[-1]

    monkeypatch.setattr(torch.Tensor, "new_empty", far_apart)
    logps, _, grads = run(operands, labels, grad, cache_budget_bytes=budget)
    assert [x.stride() for x in made if x.numel()] == [(STRIDE, 1)]
    torch.testing.assert_close(logps.double(), expected.logps, rtol=1e-6, atol=1e-5)
    for key, value in grads.items():
        assert error(value, expected.grads[key]) <= 2e-5, key


@interpreter_only
def test_statistics_beyond_2_to_the_31():
    """(slices, N) statistics of 2^24 tokens: their first tokens' tiles, and the merge of these."""
    n, block_n, v, d = 2**24, 16, 2080, 16
    operands, labels, grad, _ = make(block_n, d, v)
    expected = expect(operands, labels, grad)
    hidden = untouched(n * d).view(n, d)
    hidden[:block_n] = operands["hidden"].detach()
    num_slices = triton.cdiv(v, 64) * 4
    assert num_slices * n > 2**31
    anchors = untouched(num_slices * n).view(num_slices, n)
    totals, stats = untouched(num_slices * n).view(num_slices, n), untouched(3 * n).view(3, n)
    weight = operands["weight"].detach()
    linear_logprob_triton.linear_logprob_fwd_kernel[(triton.cdiv(v, 64),)](
        *(hidden, weight, hidden, labels, anchors, totals, totals, stats[2], totals, n, v, d),
        *(*hidden.stride(), *weight.stride(), 0, 0, 0),
        *(1, 1 / linear_logprob_triton.UNIT, 1.0),  # panels of one row block: the first tokens'
        BLOCK_N=block_n, BLOCK_V=64, BLOCK_D=16, SLICES=4, DESCRIPTORS=False, EVEN_D=True,
        PRECISION="ieee", HAS_BIAS=False, HAS_SOFTCAP=False, WITH_ENTROPY=False, STORE_E=False,
        FLATTEN=False, WARP_SPECIALIZE=False, num_warps=4, num_stages=2,
    )  # fmt: skip
    linear_logprob_triton.merge_kernel[(1,)](
        *(anchors, totals, totals, stats, n, num_slices),
        BLOCK_N=block_n, BLOCK_S=64, WITH_ENTROPY=False,
    )  # fmt: skip
    first = anchors[:, :block_n]
    assert torch.equal(first, first.round())  # integers: to rescale by 2^(a - b) is exact
    anchor, total, target = stats[:, :block_n].double()
    odds = (anchor - target) * linear_logprob_triton.UNIT + total.log()
    torch.testing.assert_close(odds.sigmoid(), expected.miss, rtol=1e-5, atol=0)
