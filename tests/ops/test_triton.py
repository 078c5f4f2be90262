"""Values and gradients of the Triton operator against the float64 form with all logits: shapes,
labels, options, operand types and layouts, and every way the kernels can be tiled."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import pytest
import torch

from kernels import linear_logprob_triton, vocab_parallel_linear_logprob
from kernels.blocks import BLOCK_TABLE, FLOAT32, OTHER, UNALIGNED, Blocks
from tests.ops.dense import error
from tests.ops.triton_cases import (
    BARS,
    BIG,
    DEVICE,
    EVERYTHING,
    SMALL,
    budget_of,
    check,
    expect,
    make,
    poisoned_memory,  # noqa: F401 - applies to every test
    recorded_launches,
    run,
    small_tiles,  # noqa: F401
    use_blocks,
)

# (N, D, V): vocabulary sizes of real models, odd sizes, no tokens, one column.
SHAPES = [
    (5, 24, 16032),
    (1, 40, 18992),
    (33, 16, 32064),
    (7, 17, 50257),
    (127, 24, 255),
    (129, 8, 100),
    (20, 576, 1000),
    (3, 896, 300),
    (5, 4096, 129),
    (20, 63, 1000),
    (3, 1, 65),
    (4, 16, 1),
    (0, 64, 255),
]
OPTIONS = [
    {},
    {"temperature": 0.7},
    {"temperature": 1.3, "logit_softcap": 2.0},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_strict_and_cached_match_the_float64_form(shape, monkeypatch):
    use_blocks(monkeypatch, BIG if shape[1] * shape[2] > 10_000 else SMALL)
    operands, labels, grad, _ = make(*shape)
    if shape[2] == 1:  # nothing to choose from: both sides are exactly zero
        logps, _, grads = run(operands, labels, grad)
        assert not logps.any() and not any(g.any() for g in grads.values())
        return
    strict, _, grads = check(operands, labels, grad)
    cached, _, cached_grads = run(operands, labels, grad, cache_budget_bytes=EVERYTHING)
    assert torch.equal(strict, cached)
    for name, expected in grads.items():
        assert error(cached_grads[name], expected.double()) <= 2e-6, name


@pytest.mark.parametrize("dtype", list(BARS), ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("mode", ["strict", "entropy", "cached", "partly cached"])
@pytest.mark.usefixtures("small_tiles")
def test_every_option_in_every_precision_over_many_tiles(dtype, options, mode):
    operands, labels, grad, grad_entropy = make(21, 40, 300, dtype, bias=True)
    itemsize = 2 if dtype == torch.bfloat16 else 4  # float16 keeps float32
    budget = {"cached": EVERYTHING, "partly cached": budget_of(3, 21, itemsize=itemsize)}
    with recorded_launches() as launches:
        check(
            operands, labels, grad, grad_entropy if mode == "entropy" else None,
            cache_budget_bytes=budget.get(mode, 0), **options,
        )  # fmt: skip
    # 5 blocks of columns: backward multiplies for those that are not kept, block by block.
    recomputed = {"cached": 0, "partly cached": 2}.get(mode, 5)
    assert len(launches["linear_logprob_bwd_kernel"]) == recomputed


@pytest.mark.parametrize(("hidden_dtype", "weight_dtype"), permutations(BARS, 2), ids=str)
@pytest.mark.usefixtures("small_tiles")
def test_mixed_operand_types_compute_in_the_wider_one(hidden_dtype, weight_dtype):
    operands, labels, grad, _ = make(20, 32, 200)
    types = {"hidden": hidden_dtype, "weight": weight_dtype}
    operands = {k: x.detach().to(types[k]).requires_grad_() for k, x in operands.items()}
    bar = max(BARS[hidden_dtype][1], BARS[weight_dtype][1])
    check(operands, labels, grad, grad_bar=bar, cache_budget_bytes=budget_of(2, 20))


TILINGS = {
    **{f"sm_{arch} {kind}": (arch, blocks) for (arch, kind), blocks in BLOCK_TABLE.items()},
    "unaligned": (None, UNALIGNED),
    "float32": (None, FLOAT32),
    "other": (None, OTHER),
    **{f"pointers, {s} slices": (None, replace(SMALL, slices=s)) for s in (1, 2, 4)},
    **{
        f"descriptors, {s} slices": (90, replace(SMALL, slices=s, descriptors=True, block_n=64))
        for s in (1, 2, 4)
    },
}


@pytest.mark.parametrize("name", TILINGS)
@pytest.mark.parametrize("budget", [0, EVERYTHING])
def test_every_tiling(name, budget, monkeypatch):
    """Sizes that no tile divides, several tiles for each persistent program."""
    arch, blocks = TILINGS[name]
    if DEVICE == "cuda" and arch is not None:
        here = linear_logprob_triton.architecture(torch.device(DEVICE))
        if here // 10 != arch // 10:
            pytest.skip(f"needs a GPU of sm_{arch}; this one is sm_{here}")
    use_blocks(monkeypatch, blocks)
    monkeypatch.setattr(linear_logprob_triton, "num_sms", lambda _: 2)
    # float32 operands show more, but the GPU's larger entries are for half types.
    is_float32 = DEVICE == "cpu" or name == "float32" or name.startswith("pointers")
    dtype = torch.float32 if is_float32 else torch.bfloat16
    operands, labels, grad, grad_entropy = make(blocks.block_n + 5, 72, 300, dtype, bias=True)
    with recorded_launches() as launches:
        check(operands, labels, grad, cache_budget_bytes=budget)
        # What COMPILER_BUGS names is refused on its architecture.
        if not budget and not (DEVICE == "cuda" and blocks.warp_specialize):
            check(operands, labels, grad, grad_entropy, temperature=0.9, logit_softcap=5.0)
    for _, _, flags in launches["linear_logprob_fwd_kernel"]:
        assert flags["DESCRIPTORS"] == blocks.descriptors and flags["SLICES"] == blocks.slices


@pytest.mark.parametrize("panel_rows", [1, 2])
@pytest.mark.parametrize("descriptors", [False, True])
def test_the_order_of_tiles_changes_no_bit(panel_rows, descriptors, monkeypatch):
    blocks = Blocks(block_n=16, block_v=64, block_d=32, num_warps=4, descriptors=descriptors)
    use_blocks(monkeypatch, replace(blocks, block_n=64) if DEVICE == "cuda" else blocks)
    block_n = linear_logprob_triton.blocks_for().block_n
    dtype = torch.bfloat16
    operands, labels, grad, _ = make(5 * block_n - 3, 32, 180, dtype)
    logps, _, grads = run(operands, labels, grad)
    itemsize = 4 if DEVICE == "cpu" else 2  # the interpreter multiplies float32 copies
    panel = panel_rows * block_n * 32 * itemsize
    monkeypatch.setattr(linear_logprob_triton, "PANEL_BYTES", panel)
    again, _, grads_again = run(operands, labels, grad)
    assert torch.equal(logps, again)
    assert all(torch.equal(grads[name], grads_again[name]) for name in grads)


@pytest.mark.parametrize("labels_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("budget", [0, budget_of(2, 14)])
@pytest.mark.usefixtures("small_tiles")
def test_labels_on_the_borders_of_tiles_and_slices(labels_dtype, budget):
    operands, _, grad, _ = make(14, 16, 200)
    borders = [0, 31, 32, 63, 64, 95, 96, 127, 128, 159, 191, 192, 199, 0]
    labels = torch.tensor(borders, dtype=labels_dtype, device=DEVICE)
    check(operands, labels, grad, cache_budget_bytes=budget)


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize(
    ("budget", "descriptors"), [(0, False), (0, True), (EVERYTHING, False), (EVERYTHING, True)]
)
def test_padding_rows_take_no_part_whatever_they_hold(garbage, budget, descriptors, monkeypatch):
    if descriptors and DEVICE == "cuda":
        pytest.skip("float32 operands; the GPU's descriptors are for half types")
    use_blocks(monkeypatch, replace(SMALL, descriptors=descriptors))
    operands, labels, grad, _ = make(20, 16, 150, bias=True)
    expected = run(operands, labels, grad)
    with torch.no_grad():
        padding = {"weight": (50, 16), "bias": (50,)}
        operands |= {
            name: torch.cat([operands[name], torch.full(shape, garbage, device=DEVICE)])
            for name, shape in padding.items()
        }
    for name in padding:
        operands[name].requires_grad_()
    logps, _, grads = run(operands, labels, grad, vocab_size=150, cache_budget_bytes=budget)
    assert torch.equal(logps, expected[0])
    assert error(grads["hidden"], expected[2]["hidden"].double()) <= 1e-6
    for name in padding:
        assert error(grads[name][:150], expected[2][name].double()) <= 1e-6
        assert not grads[name][150:].any()


@pytest.mark.parametrize("label", [-100, -1, 200, 2**31, -(2**32) + 5])
@pytest.mark.usefixtures("small_tiles")
def test_an_unchecked_label_out_of_range_gives_minus_infinity(label):
    """It must not touch memory elsewhere, nor another row."""
    operands, labels, grad, _ = make(10, 16, 200)
    expected, _, expected_grads = run(operands, labels, grad)
    grad[3] = 0
    labels[3] = label
    logps, _, grads = run(operands, labels, grad, check_labels=False)
    others = torch.arange(10) != 3
    assert logps[3] == -torch.inf
    assert torch.equal(logps[others], expected[others])
    assert torch.equal(grads["hidden"][others], expected_grads["hidden"][others])
    with pytest.raises(ValueError, match=f"label {label} is outside the vocabulary of 200 ids"):
        run(operands, labels, grad, check_labels=True)


@pytest.mark.parametrize("budget", [0, budget_of(2, 20), EVERYTHING])
@pytest.mark.usefixtures("small_tiles")
def test_transposed_strided_and_offset_operands(budget):
    operands, labels, grad, _ = make(20, 16, 150, bias=True)
    plain = {name: x.detach() for name, x in operands.items()}
    strided = {
        "hidden": plain["hidden"].T.contiguous().T,
        "weight": torch.stack([plain["weight"]] * 2, 2)[..., 0],
        "bias": torch.stack([plain["bias"]] * 3, 1)[:, 1],
    }
    labels = torch.stack([labels, torch.zeros_like(labels)], 1)[:, 0]
    assert not any(x.is_contiguous() for x in (*strided.values(), labels))
    for x in strided.values():
        x.requires_grad_()
    check(strided, labels, grad, cache_budget_bytes=budget)
    offset = torch.cat([torch.zeros(3, 16, device=DEVICE), plain["hidden"]])[3:].requires_grad_()
    check({**operands, "hidden": offset}, labels, grad, cache_budget_bytes=budget)


@pytest.mark.usefixtures("small_tiles")
def test_rows_that_are_one_and_the_same():
    operands, labels, grad, _ = make(20, 16, 150)
    operands["hidden"] = operands["hidden"][:1].detach().expand(20, 16).requires_grad_()
    check(operands, labels[:1].expand(20), grad)


def test_descriptors_are_only_for_rows_on_16_bytes(monkeypatch):
    """Half operands whose rows are cut out of longer ones take the pointers' entry."""
    seen = []

    def blocks_for(arch, d, dtype, row_multiple, softcap):
        seen.append(row_multiple % 8 == 0)
        return replace(SMALL, block_n=64, descriptors=seen[-1])

    monkeypatch.setattr(linear_logprob_triton, "blocks_for", blocks_for)
    wide = make(70, 24, 200, torch.bfloat16)
    for width, first in ((24, 0), (20, 0), (16, 8), (16, 1)):
        operands, labels, grad, _ = wide
        cut = {k: x.detach()[:, first : first + width] for k, x in operands.items()}
        if width == 20:
            cut = {k: x.contiguous() for k, x in cut.items()}  # rows of 40 bytes
        cut = {k: x.requires_grad_() for k, x in cut.items()}
        check(cut, labels, grad)
    assert seen == [True, True, False, False, True, True, False, False]


def test_the_torch_implementation_agrees(monkeypatch):
    use_blocks(monkeypatch, SMALL)
    operands, labels, grad, grad_entropy = make(40, 48, 300, bias=True)
    options = {"temperature": 0.8, "logit_softcap": 6.0}
    ours = run(operands, labels, grad, grad_entropy, **options)
    theirs = run(operands, labels, grad, grad_entropy, impl="torch", **options)
    expected = expect(operands, labels, grad, grad_entropy, **options)
    for result in (ours, theirs):
        assert error(result[0], expected.logps) <= 1e-6
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-6, atol=4e-6)
    for name in operands:
        assert error(ours[2][name], theirs[2][name].double()) <= 5e-6, name


@pytest.mark.usefixtures("small_tiles")
def test_auto_is_the_implementation_of_the_device():
    operands, labels, grad, _ = make(10, 16, 200)
    expected = run(operands, labels, grad, impl="triton" if DEVICE == "cuda" else "torch")
    with recorded_launches() as launches:
        logps = vocab_parallel_linear_logprob(labels=labels, **operands)
    assert torch.equal(logps, expected[0])
    assert bool(launches["linear_logprob_fwd_kernel"]) == (DEVICE == "cuda")


def test_what_the_compiler_cannot_do_is_refused(monkeypatch):
    monkeypatch.setattr(linear_logprob_triton, "architecture", lambda _: 100)
    use_blocks(monkeypatch, replace(SMALL, slices=2, descriptors=True, warp_specialize=True))
    operands, labels, grad, _ = make(20, 32, 200)
    with pytest.raises(NotImplementedError, match="warp_specialize with 2 slices does not compile"):
        run(operands, labels, grad)
