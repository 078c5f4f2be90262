"""The operator's benchmark: it refuses wrong operators, and its numbers are what they say."""

import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import contenders, linear_logprob, measure, parity, plot
from benchmarks.measure import PASSES
from kernels.linear_logprob import vocab_parallel_linear_logprob
from tests.ops.dense import dense_result

NAMES = ("ours-strict", "ours-cached", "materialised", "torch-lce-1024", "gemms-3", "gemms-4")


def bench(results, *args: str) -> int:
    few = ["--device", "cpu", "--shape", "tiny", "--repeats", "1", "--skip", "torch-lce"]
    return linear_logprob.main([*few, "--results", str(results), *args])


def rows_in(results) -> list[dict]:
    return [row for path in results.glob("*.jsonl") for row in measure.read_rows(path)]


@pytest.fixture
def make_wrong(monkeypatch):
    """Replaces the operator by one whose result is changed by `spoil(logps, hidden, weight)`."""

    def replace(spoil):
        def wrong(hidden, weight, labels, *, cache_budget_bytes, impl):
            # The cached mode takes another path to the same result: strict is enough here.
            return spoil(vocab_parallel_linear_logprob, hidden, weight, labels)

        monkeypatch.setattr(contenders, "vocab_parallel_linear_logprob", wrong)

    return replace


def shifted_logp(op, hidden, weight, labels):
    logps = op(hidden, weight, labels)
    return logps + 2e-5 * (torch.arange(len(logps)) == 1)  # a single token


def scaled_dhidden(op, hidden, weight, labels):
    return op(1.01 * hidden - (0.01 * hidden).detach(), weight, labels)


def scaled_dweight(op, hidden, weight, labels):
    return op(hidden, 1.01 * weight - (0.01 * weight).detach(), labels)


def nan_dhidden(op, hidden, weight, labels):
    hidden = hidden.clone()
    if hidden.requires_grad:
        hidden.register_hook(lambda grad: grad.index_fill(0, torch.tensor([7]), math.nan))
    return op(hidden, weight, labels)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (shifted_logp, "logp: max error"),
        (scaled_dhidden, "dhidden p99"),
        (scaled_dweight, "dweight p99"),
        (nan_dhidden, "dhidden p99"),
    ],
    ids=["logp", "dhidden", "dweight", "nan"],
)
def test_no_speed_for_a_wrong_operator(make_wrong, spoil, says, dtype, tmp_path, capsys):
    make_wrong(spoil)
    assert bench(tmp_path, "--dtype", dtype) == 1
    out = capsys.readouterr().out
    failed = [line for line in out.splitlines() if "PARITY FAILED" in line]
    assert any("ours-strict" in line and says in line for line in failed), out
    assert "median ms" not in out and "TFLOP/s" not in out and rows_in(tmp_path) == []


def test_rivals_that_cannot_do_it_are_named_and_the_rest_runs(monkeypatch, tmp_path, capsys):
    def ignores_the_gradient(inputs):
        logps = contenders._materialised(inputs)
        return logps.detach() + logps.mean() - logps.mean().detach()

    def refuses(inputs):
        raise TypeError("unexpected argument")

    rivals = {"scalar": ("torch", ignores_the_gradient), "broken": ("torch", refuses)}
    monkeypatch.setattr(contenders, "RIVALS", rivals)
    assert bench(tmp_path, "--dtype", "float32") == 0
    out = capsys.readouterr().out
    assert "scalar: not run: wrong results" in out
    assert "broken: not run: TypeError: unexpected argument" in out
    assert {row["contender"] for row in rows_in(tmp_path)} == {*NAMES} - {"torch-lce-1024"}


def test_what_is_not_installed_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(contenders, "find_spec", lambda name: name == "torch" or None)
    assert bench(tmp_path, "--dtype", "float32") == 0
    out = capsys.readouterr().out
    assert "liger: not run: liger_kernel is not installed" in out
    assert "cce: not run: cut_cross_entropy is not installed" in out
    assert "torch-lce: not run: skipped on request" in out


def test_command_line_appends_rows_and_plot_draws_them(tmp_path):
    command = [
        sys.executable, "-m", "benchmarks.linear_logprob", "--device", "cpu", "--shape", "tiny",
        "--tokens", "48", "33", "--dtype", "bfloat16", "--repeats", "2", "--threads", "1",
        "--skip", "torch-lce", "--results", str(tmp_path),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_in(tmp_path)
    keys = [(row["n"], row["contender"], row["pass"]) for row in rows]
    assert keys == [(n, name, p) for n in (48, 33) for name in NAMES for p in PASSES]
    for row in rows:
        assert row["threads"] == 1 and row["repeats"] == 2 and row["device_type"] == "cpu"
        assert row["benchmark"] == "linear_logprob"
        assert row["torch"] == torch.__version__ and set(row["cpu_flags"]) == {"amx", "avx512_bf16"}
        assert 0 < row["min_s"] <= row["p20_s"] <= row["median_s"] <= row["p80_s"]
        gemms = linear_logprob.USEFUL_GEMMS[row["pass"]]
        flops = gemms * 2 * row["n"] * 64 * 1000
        assert row["tflops"] == pytest.approx(flops / row["median_s"] / 1e12)
    ours = [row for row in rows if row["contender"] == "ours-strict"]
    assert all(row["logp_of_bar"] <= 1 and row["dhidden_p99"] <= 5e-3 for row in ours)

    (path,) = tmp_path.glob("*.jsonl")
    size = len(rows)
    assert bench(tmp_path, "--dtype", "float32") == 0
    assert len(measure.read_rows(path)) == size + len(NAMES) * len(PASSES)
    assert plot.main([str(path)]) == 0
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_statistics_by_hand():
    assert measure.statistics([5.0, 1.0, 2.0, 4.0, 3.0, 6.0]) == pytest.approx(
        {"median_s": 3.5, "p20_s": 2.0, "p80_s": 5.0, "min_s": 1.0, "repeats": 6}
    )


def test_slow_contenders_get_fewer_rounds():
    assert measure.rounds_within(60, 2.0, 7) == 7
    assert measure.rounds_within(60, 12.0, 7) == 5
    assert measure.rounds_within(60, 100.0, 7) == 1


def test_ways_take_turns():
    order = []
    samples = measure.take_turns(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2
    )
    assert order == ["a", "b", "a", "b"] and {len(seconds) for seconds in samples.values()} == {2}


def test_contenders_take_turns(monkeypatch):
    order = []

    def one_round(contender, inputs, clock):
        order.append(contender.name)
        return dict.fromkeys(PASSES, float(len(order)))

    monkeypatch.setattr(measure, "_one_round", one_round)
    inputs = contenders.make_inputs(4, 8, 16, torch.float32, "cpu")
    both = [SimpleNamespace(name="a"), SimpleNamespace(name="b")]
    samples = measure.time_interleaved(both, inputs, {"a": 3, "b": 2})
    assert order == ["a", "b", "a", "b", "a"]
    assert samples["a"]["both"] == [1.0, 3.0, 5.0] and samples["b"]["forward"] == [2.0, 4.0]


def case_rows(**times: float) -> list[dict]:
    memory = {"materialised": 400, "ours-strict": 90}
    return [
        {"contender": name.replace("_", "-"), "pass": "both", "min_s": seconds,
         "extra_bytes": memory.get(name.replace("_", "-"), 0)}
        for name, seconds in times.items()
    ]  # fmt: skip


def test_ratios_by_hand(monkeypatch):
    monkeypatch.setattr(linear_logprob, "cpu_flags", lambda: {"amx": False, "avx512_bf16": True})
    times = {"materialised": 2.0, "ours_strict": 1.7, "ours_cached": 1.0, "gemms_3": 0.8,
             "gemms_4": 1.0}  # fmt: skip
    case = linear_logprob.Case(
        shape="smollm2", n=512, d=576, v=49152, dtype="bfloat16", device_type="cpu"
    )
    ratios = linear_logprob.make_ratios(case, case_rows(**times))
    assert [ratio.value for ratio in ratios] == pytest.approx([0.5, 1.25, 0.85, 1.7, 0.225])
    assert [ratio.bar for ratio in ratios] == [0.6, 1.6, 0.75, 1.6, 0.25]
    # Exact logits come out of the bfloat16 units with AMX only: without it only memory is asserted.
    assert [ratio.asserted for ratio in ratios] == [False, False, False, False, True]
    assert not any(ratio.missed() for ratio in ratios)

    monkeypatch.setattr(linear_logprob, "cpu_flags", lambda: {"amx": True, "avx512_bf16": True})
    ratios = linear_logprob.make_ratios(case, case_rows(**times))
    assert [ratio.missed() for ratio in ratios] == [False, False, True, True, False]
    del times["ours_cached"]  # did not run: that is a miss, not a pass
    ratios = linear_logprob.make_ratios(case, case_rows(**times))
    assert [ratio.missed() for ratio in ratios] == [True, True, True, True, False]


def test_bars_belong_to_one_shape():
    case = linear_logprob.Case(
        shape="tiny", n=512, d=64, v=1000, dtype="float32", device_type="cpu"
    )
    ratios = linear_logprob.make_ratios(case, case_rows(materialised=1.0, ours_strict=9.0))
    assert all(ratio.bar is None and not ratio.missed() for ratio in ratios)


@pytest.mark.parametrize("block_bytes", [2**28, 8 * 50 * 7], ids=["whole", "7 rows a block"])
def test_float64_results(block_bytes, monkeypatch):
    monkeypatch.setattr(parity, "BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(parity, "NUM_COLUMNS", 9)
    inputs = contenders.make_inputs(23, 16, 50, torch.bfloat16, "cpu")
    exact = parity.exact_results(inputs)
    dense = dense_result(inputs.hidden, inputs.weight, inputs.labels, grad_logps=inputs.grad)
    assert len(exact.rows) == (23 if block_bytes == 2**28 else 7) and len(exact.columns) == 9
    torch.testing.assert_close(exact.logps, dense.logps, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(
        exact.dhidden, dense.grads["hidden"][exact.rows], rtol=1e-7, atol=1e-12
    )
    torch.testing.assert_close(exact.dweight, dense.grads["weight"][exact.columns])
    logits = inputs.hidden.detach().double() @ inputs.weight.detach().double().T
    torch.testing.assert_close(exact.logit_max, logits.abs().amax(1))


def test_errors_by_hand():
    exact = parity.Exact(
        logps=torch.tensor([-1.0, -2.0], dtype=torch.float64),
        logit_max=torch.tensor([30.0, 100.0], dtype=torch.float64),
        rows=torch.tensor([0, 1]),
        dhidden=torch.tensor([[3.0, 4.0], [0.0, 2.0]], dtype=torch.float64),
        columns=torch.tensor([1]),
        dweight=torch.tensor([[1.0, 0.0]], dtype=torch.float64),
    )
    logps = torch.tensor([-1.0 + 5e-6, -2.0 + 1e-4], dtype=torch.float64)
    dhidden = torch.tensor([[3.0, 4.0], [0.0, 3.0]])  # row errors 0 and 1 / 2
    dweight = torch.tensor([[9.0, 9.0], [1.0, 0.1]])
    errors = parity.errors_of(exact, logps, dhidden, dweight)
    assert errors.logp_max == pytest.approx(1e-4)
    assert errors.logp_of_bar == pytest.approx(0.5)  # 5e-6 of 1e-5, and 1e-4 of 2e-6 * 100
    assert errors.dhidden_median == pytest.approx(0.25)
    assert errors.dhidden_p99 == pytest.approx(0.495)
    assert errors.dweight_p99 == pytest.approx(0.1)


def test_inputs_have_confident_tokens_and_gradients_of_both_signs():
    inputs = contenders.make_inputs(400, 64, 1000, torch.bfloat16, "cpu")
    exact = parity.exact_results(inputs)
    miss = -torch.expm1(exact.logps)
    assert miss.min() < 1e-6 and miss.max() > 0.9 and exact.logit_max.max() <= 30
    assert (inputs.grad > 0).any() and (inputs.grad < 0).any()
    assert len(inputs.grad.unique()) == 400


def test_extra_memory_of_kept_logits():
    """Log-probs, their gradient and the gradient's gather are (N, V) float32 at the same time."""
    inputs = contenders.make_inputs(128, 16, 4000, torch.float32, "cpu")
    found, _ = contenders.make_contenders(inputs, "auto")
    kept = next(c for c in found if c.name == "materialised")
    extra = measure.probe(kept, inputs)[1].extra_bytes
    logits = 128 * 4000 * 4
    assert extra["forward"] == pytest.approx(2 * logits, rel=0.02)
    assert 2.8 * logits <= extra["both"] <= 3.2 * logits


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda(tmp_path, capsys):
    args = ["--device", "cuda", "--shape", "tiny", "--repeats", "2", "--results", str(tmp_path)]
    assert linear_logprob.main(args) == 0, capsys.readouterr().out
    rows = rows_in(tmp_path)
    assert {"ours-strict", "ours-cached", "materialised", "gemms-3"} <= {
        r["contender"] for r in rows
    }
    assert all(row["device"] == torch.cuda.get_device_name() for row in rows)
    assert all(row["extra_bytes"] >= 0 for row in rows if row["extra_bytes"] is not None)
