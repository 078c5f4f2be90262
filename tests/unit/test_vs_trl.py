"""What judges both trainers side by side: rows, order, losses, times, memory."""

import json
import math
import sys
import types

import pytest
import torch

from benchmarks import vs_trl, vs_trl_report, vs_trl_rows, vs_trl_runs
from benchmarks.vs_trl_rows import Pair, first_wrong_pair, select_pairs, tokenize
from benchmarks.vs_trl_runs import Case, Setting
from reinforcer_tp.config import load_config


class Words:
    """A tokenizer whose template marks the roles; a word is a token."""

    def __init__(self):
        self.ids: dict[str, int] = {}

    def apply_chat_template(self, messages, *, add_generation_prompt=False, return_dict=True):
        assert return_dict is False
        words = [w for m in messages for w in (f"<{m['role']}>", *m["content"].split(), "<end>")]
        words += ["<assistant>"] * add_generation_prompt
        return [self.ids.setdefault(word, len(self.ids)) for word in words]


def chat(prompt: str, chosen: str, rejected: str) -> dict:
    texts = {"user": prompt, "chosen": chosen, "rejected": rejected}
    return {
        "prompt" if name == "user" else name: [
            {"role": "user" if name == "user" else "assistant", "content": text}
        ]
        for name, text in texts.items()
    }


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_pairs_longer_than_the_limit_on_either_side_are_left_out(tmp_path):
    rows = [
        chat("a b", "c", "d"),  # 7 tokens a side: 5 of the prompt, a word, the end
        chat("a b", "c c c", "d"),
        chat("a b", "c", "d d d"),
        chat("a b", "same", "same"),
        chat("a b", "c c", "d"),
    ]
    file = write(tmp_path / "rows.jsonl", rows)
    pairs, passed_over = select_pairs(file, Words(), 2, max_length=8)
    assert [pair.row for pair in pairs] == [rows[0], rows[4]] and passed_over == 3
    assert [len(pairs[1].chosen[0]), len(pairs[1].rejected[0])] == [8, 7]
    assert pairs[1].chosen[1] == pairs[1].rejected[1] == 5
    with pytest.raises(ValueError, match=r"has 2 pairs of at most 8 tokens, expected 3"):
        select_pairs(file, Words(), 3, max_length=8)


def test_rows_of_text_are_refused(tmp_path):
    file = write(tmp_path / "rows.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    with pytest.raises(ValueError, match=r"line 1: expected lists of messages"):
        select_pairs(file, Words(), 1, max_length=8)


def test_the_prompt_is_what_both_sides_share_with_it():
    class Merging(Words):  # the prompt alone ends in another token than it has in a whole text
        def apply_chat_template(self, messages, *, add_generation_prompt=False, return_dict=True):
            ids = super().apply_chat_template(messages, return_dict=return_dict)
            return [*ids, 999] if add_generation_prompt else ids

    pair = tokenize(chat("a b", "c", "d"), Merging())
    assert pair.chosen[1] == pair.rejected[1] == 4
    assert pair.chosen[0][:4] == pair.rejected[0][:4]


def pair(*ids: int, prompt: int = 1) -> Pair:
    return Pair(row={}, chosen=([*ids], prompt), rejected=([*ids, 7], prompt))


def test_other_ids_or_another_order_are_found():
    expected = [pair(1, 2), pair(1, 3), pair(1, 4), pair(1, 5)]
    steps = [expected[:2], expected[2:]]
    assert first_wrong_pair(steps, expected, 2) is None
    swapped = first_wrong_pair([steps[0][::-1], steps[1]], expected, 2)
    assert swapped == "step 1, pair 0, chosen: token 1 of 2 is [3], expected [2] of 2"
    assert "step 2, pair 1" in first_wrong_pair([steps[0], [pair(1, 4), pair(1, 6)]], expected, 2)
    assert "1 tokens are prompt, expected 2" in first_wrong_pair(
        [[pair(1, 2)]], [pair(1, 2, prompt=2)], 1
    )
    assert first_wrong_pair([steps[0][:1]], expected, 2) == "step 1 has 1 pairs, expected 2"
    shorter = Pair(row={}, chosen=([1, 2], 1), rejected=([1, 2], 1))
    short = first_wrong_pair([[shorter]], expected[:1], 1)
    assert short == "step 1, pair 0, rejected: token 2 of 2 is [], expected [7] of 3"


def row(contender: str, losses, step_s, *, round_=0, precision="float32", **others) -> dict:
    steps = [
        {"loss": x, "grad_norm": 2.0, "logps_chosen": -100.0, "logps_rejected": -50.0}
        for x in losses
    ]
    case = {"pairs": 4, "precision": precision, "reference": "resident", "steps": len(losses)}
    values = {"peak_gib": 2.0, "prepare_s": 1.0, "first_step_s": 30.0}
    return {"contender": contender, "round": round_, "case": case, "steps": steps} | (
        values | {"step_s": step_s} | others
    )


LN2 = math.log(2)


@pytest.mark.parametrize(
    ("precision", "other", "agrees"),
    [
        ("float32", 0.69 * (1 + 0.9e-4), True),
        ("float32", 0.69 * (1 + 1.1e-4), False),
        ("float32", 0.69 * (1 - 1.1e-4), False),
        ("bfloat16", 0.69 + 2.9e-2, True),
        ("bfloat16", 0.69 + 3.1e-2, False),
        ("bfloat16", math.nan, False),
        ("float32", math.inf, False),
    ],
)
def test_no_speed_where_losses_differ(precision, other, agrees):
    rows = [
        row("ours", [LN2, other], [1.0], precision=precision),
        row("trl", [LN2, 0.69], [4.0], precision=precision),
    ]
    if agrees:
        assert vs_trl_report.summarize(rows)[1]["speed_up"] == 4.0
        return
    with pytest.raises(ValueError) as refusal:
        vs_trl_report.summarize(rows)
    said = str(refusal.value)
    assert f"step 2: the loss is {other:.7g} (ours) and 0.69 (trl)" in said
    assert "no speed-up is reported" in said and "4.0" not in said


def test_no_speed_where_log_probs_differ():
    """The first loss is ln 2 whatever a model computes; its log-probs are not."""
    rows = [row("ours", [LN2], [1.0]), row("trl", [LN2], [4.0])]
    rows[0]["steps"][0]["logps_rejected"] *= 1 + 1.1e-4
    with pytest.raises(ValueError, match=r"step 1: logps_rejected is -50.0055 \(ours\) and -50 "):
        vs_trl_report.summarize(rows)


def test_every_round_is_compared_with_every_other():
    rows = [
        row("ours", [LN2, 0.6], [1.0]),
        row("trl", [LN2, 0.6], [1.0]),
        row("ours", [LN2, 0.5], [1.0], round_=1),
        row("trl", [LN2, 0.6], [1.0], round_=1),
    ]
    with pytest.raises(ValueError, match=r"step 2: the loss is 0.5 \(ours\) and 0.6 \(trl\)"):
        vs_trl_report.summarize(rows)


def test_figures_by_hand():
    rows = [
        row("ours", [LN2, 0.6, 0.5], [1.0, 2.0], peak_gib=1.5),
        row("trl", [LN2, 0.6, 0.5 * (1 + 5e-5)], [4.0, 8.0], peak_gib=5.0),
        row("ours", [LN2, 0.6, 0.5], [1.0, 4.0], round_=1, peak_gib=2.0, first_step_s=10.0),
        row("trl", [LN2, 0.6, 0.5], [6.0, 6.0], round_=1, peak_gib=4.0),
    ]
    rows[3]["steps"][1]["grad_norm"] = 1.6
    ours, trl = vs_trl_report.summarize(rows)
    assert ours["contender"] == "ours" and "speed_up" not in ours
    assert ours["pairs_per_s"] == 4 * 4 / 8 and trl["pairs_per_s"] == 4 * 4 / 24
    assert (ours["median_s"], trl["median_s"], trl["timed_steps"]) == (1.5, 6.0, 4)
    assert trl["speed_up"] == pytest.approx(3.0)
    assert trl["memory_share"] == 2.0 / 5.0  # the largest of each
    assert trl["first_step_speed_up"] == 30 / 20
    assert trl["loss_difference"] == pytest.approx(5e-5, rel=1e-3)
    assert trl["grad_norm_difference"] == pytest.approx(0.25)
    assert [met for met, _ in vs_trl_report.verdicts([ours, trl])] == [True]  # float32: 2x
    bf16 = trl | {"precision": "bfloat16", "speed_up": 2.9, "memory_share": 0.41}
    assert [met for met, _ in vs_trl_report.verdicts([bf16])] == [False, False]


ABOUT = {
    "device": "A CPU, 2 cores", "threads": 2, "date": "2026-01-01", "commit": "abc",
    "cpu_flags": {"amx": True}, "versions": {"torch": "2"}, "model": "m", "data": "d.jsonl",
    "num_pairs": 16, "passed_over": 3, "max_length": 512, "lr": 1e-6, "rounds": 2,
    "micro_batch_tokens": 2048, "trl_micro_batch": 4,
}  # fmt: skip


def test_the_table_tells_what_was_measured(tmp_path):
    rows = [
        ABOUT | row("ours", [LN2, 0.6], [1.0], precision="bfloat16"),
        ABOUT | row("trl", [LN2, 0.61], [4.0], precision="bfloat16", peak_gib=8.0),
    ]
    summaries = vs_trl_report.summarize(rows)
    text = vs_trl_report.table(summaries, ABOUT)
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("| bfloat16")
    ]
    assert cells[0][1:5] == ["ours", "bf16 + float32 masters", "1.00 (1.00-1.00)", "4.000"]
    assert cells[1][1:3] == ["trl", "bf16, no masters"]
    assert cells[1][5:8] == ["4.00x", "8.00", "0.25 of it"]
    assert cells[1][9] == "1.0e-02 absolute"
    assert "2048 tokens" in text and "(3 longer or undecided" in text
    image = vs_trl_report.draw(rows, summaries, tmp_path / "plot.png")
    assert image.read_bytes().startswith(b"\x89PNG")


def test_our_default_beside_trls():
    stored = row("ours", [LN2, 0.6], [1.0], peak_gib=1.0, prepare_s=7.5)
    stored["case"]["reference"] = "precomputed"
    rows = [row("ours", [LN2, 0.6], [2.0]), row("trl", [LN2, 0.6], [5.0], peak_gib=4.0), stored]
    (said,) = vs_trl_report.as_each_comes(vs_trl_report.summarize(rows))
    assert "5.00x the pairs/s, 0.25 of the peak memory" in said and "took 7.5 s" in said


def test_contenders_take_turns():
    assert list(vs_trl.turns(2, ["ours", "trl"])) == [
        (0, "ours"), (0, "trl"), (1, "ours"), (1, "trl"),
    ]  # fmt: skip


def parsed(*args: str):
    return vs_trl._parse(["--model", "m", "--data", "d", *args])


def test_cases_of_many_pairs_are_few_unless_asked():
    chosen = vs_trl.choose_cases(parsed())
    assert [(c.pairs, c.steps) for c in chosen] == [(4, 3)] * 4 + [(16, 2)]
    assert (chosen[-1].precision, chosen[-1].reference) == ("bfloat16", "resident")
    assert len(vs_trl.choose_cases(parsed("--all"))) == 8
    assert len(vs_trl.choose_cases(parsed("--pairs", "16"))) == 4
    few = vs_trl.choose_cases(parsed("--quick"))
    assert [(c.precision, c.reference) for c in few] == [
        ("bfloat16", "resident"),
        ("float32", "resident"),
    ]
    (only,) = vs_trl.choose_cases(
        parsed("--quick", "--precision", "float32", "--reference", "precomputed")
    )
    assert only == Case(pairs=4, precision="float32", reference="precomputed", steps=2)


@pytest.mark.parametrize("args", [("--steps", "1"), ("--pairs", "6"), ("--pairs", "0")])
def test_what_cannot_be_compared_is_refused(args, capsys):
    with pytest.raises(SystemExit):
        parsed(*args)


def setting(**others) -> Setting:
    values = {"model": "m", "rows": "r.jsonl", "threads": 2, "micro_batch_tokens": 2048}
    return Setting(**values | {"trl_python": "python"} | others)


@pytest.mark.parametrize(
    ("precision", "reference", "pairs"),
    [("float32", "resident", 4), ("bfloat16", "precomputed", 16)],
)
def test_both_trainers_are_asked_for_the_same(precision, reference, pairs, tmp_path):
    case = Case(pairs=pairs, precision=precision, reference=reference, steps=3)
    overrides = vs_trl_runs.our_overrides(case, setting(), tmp_path)
    ours = load_config(str(vs_trl.CONFIG), overrides)
    trl = vs_trl_runs.trl_settings("trl", case, setting(), tmp_path)
    adam, schedule = ours.policy.megatron_cfg.optimizer, ours.policy.megatron_cfg.scheduler
    wanted = trl["optimizer"]
    assert adam.optimizer == "adam"
    assert (adam.lr, adam.adam_beta1, adam.adam_beta2, adam.adam_eps, adam.weight_decay) == tuple(
        wanted[name] for name in ("lr", "beta1", "beta2", "eps", "weight_decay")
    )
    assert ours.policy.max_grad_norm == wanted["max_grad_norm"] and adam.clip_grad is None
    assert (schedule.lr_decay_style, schedule.lr_warmup_iters) == ("constant", 0)
    assert ours.dpo.reference_policy_kl_penalty == trl["beta"]
    assert ours.dpo.max_num_steps == trl["steps"]
    assert ours.policy.max_total_sequence_length == trl["max_length"]
    assert ours.policy.precision == trl["weights"] == precision
    batch = trl["micro_batch_pairs"] * trl["accumulation"]
    assert ours.policy.train_global_batch_size == batch == pairs
    assert trl["micro_batch_pairs"] == 4 and not ours.data.shuffle
    assert trl["precompute"] == (ours.reference.mode == "store") == (reference == "precomputed")


def test_a_run_is_watched_from_outside(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        "import subprocess, sys, time\n"
        "hold = 'import time; x = bytearray(%d << 20); time.sleep(%g)'\n"
        "child = subprocess.Popen([sys.executable, '-c', hold % (60, 1.0)])\n"
        "with open(sys.argv[1], 'w') as file:\n"
        "    x = bytearray(90 << 20); time.sleep(0.5); del x\n"
        "    for _ in range(2):\n"
        "        file.write('{}\\n'); file.flush(); time.sleep(0.4)\n"
        "child.wait()\n"
    )
    command = [sys.executable, str(script), str(tmp_path / "steps.jsonl")]
    seen = vs_trl_runs.watch(command, {}, tmp_path / "steps.jsonl", tmp_path / "out.txt")
    first, second = seen.stamps
    assert first >= 0.5 and second - first >= 0.1  # it was looked at some time in between
    assert 0.15 <= seen.peak_gib <= 0.25  # 90 + 60 MiB, and two interpreters
    assert seen.held_kib[-1][1] < 2**20 * seen.peak_gib - 40 * 1024  # what was freed is not held


def test_a_run_that_fails_says_how(tmp_path):
    command = [sys.executable, "-c", "raise ValueError('no such model')"]
    with pytest.raises(RuntimeError, match="ended with 1") as error:
        vs_trl_runs.watch(command, {}, tmp_path / "steps.jsonl", tmp_path / "out.txt")
    assert str(error.value).endswith("ValueError: no such model")


@pytest.fixture
def trl_run(monkeypatch):
    """TRL's half without TRL."""
    stub = types.SimpleNamespace(DPOConfig=object, DPOTrainer=object)
    monkeypatch.setitem(sys.modules, "trl", stub)
    monkeypatch.delitem(sys.modules, "benchmarks.trl_run", raising=False)
    from benchmarks import trl_run

    yield trl_run
    sys.modules.pop("benchmarks.trl_run", None)


def test_what_trl_was_given_is_read_without_its_padding(trl_run):
    inputs = {  # two pairs: the chosen sides, then the rejected ones
        "input_ids": torch.tensor([[5, 6, 7, 0], [5, 8, 0, 0], [5, 6, 9, 9], [5, 4, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]]),
        "completion_mask": torch.tensor([[0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 1, 1], [0, 1, 0, 0]]),
    }
    given = trl_run.given_pairs(inputs)
    assert given[0] == {"chosen": [[5, 6, 7], 2], "rejected": [[5, 6, 9, 9], 2]}
    assert given[1] == {"chosen": [[5, 8], 1], "rejected": [[5, 4], 1]}
    (found,) = vs_trl_rows.steps_of_trl([{"pairs": given}])
    assert found[0].rejected == ([5, 6, 9, 9], 2)


def test_a_step_of_trl_is_the_mean_of_its_micro_batches(trl_run, tmp_path):
    seen = [{"loss": x, "pairs": [f"pair{i}"]} for i, x in enumerate((9.0, 1.0, 3.0))]
    logs = {"grad_norm": 2, "learning_rate": 1e-6, "logps/chosen": -1.0, "logps/rejected": -2.0}
    with (tmp_path / "steps.jsonl").open("w") as file:
        writer = trl_run.StepWriter(file, seen, accumulation=2)
        writer.on_log(None, types.SimpleNamespace(global_step=3), None, logs=logs)
        writer.on_log(None, types.SimpleNamespace(global_step=3), None, logs={"train_loss": 1.0})
    (line,) = vs_trl_runs.read_lines(tmp_path / "steps.jsonl")
    assert (line["step"], line["loss"], line["pairs"]) == (3, 2.0, ["pair1", "pair2"])


def test_trls_half_imports_nothing_of_ours():
    source = vs_trl_runs.TRL_RUN.read_text()
    assert "reinforcer_tp" not in source and "from benchmarks" not in source
