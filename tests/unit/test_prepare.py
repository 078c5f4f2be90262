"""Sections -> tokenized sets: every row accounted for, one result for all workers and ranks."""

import gzip
import itertools
import json
import math
import multiprocessing
import os
import time
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reinforcer_tp.data import TokenizedPair, TokenizedSet, format_report, handover, prepare_data
from reinforcer_tp.data import tokenize_set as tokenize_set_module
from reinforcer_tp.data.chat import EncodeOptions
from reinforcer_tp.data.packed_batch import build_packed_batch
from reinforcer_tp.data.pairs import TaskDataSpec
from reinforcer_tp.data.tokenize_set import SetOptions, tokenize_set
from tests.unit.toy_tokenizer import CHATML, ids_of, toy_tokenizer

ASSETS = os.environ.get("REINFORCER_TP_ASSETS")
TOKENIZER = toy_tokenizer(chat_template=CHATML, adds_bos=True)
FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf_cache")
    monkeypatch.setenv("REINFORCER_TP_CACHE", str(tmp_path / "cache"))


def jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def text_row(index: int, **extra) -> dict:
    return {"prompt": f"{index}? ", "chosen": f"yes {index}", "rejected": "no", **extra}


def reference(chosen: float, rejected: float) -> dict:
    return {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}


def prepare(config: dict, **kwargs):
    kwargs = {"tokenizer": TOKENIZER, "max_total_sequence_length": 40} | kwargs
    return prepare_data({"dataset_name": "auto"} | config, **kwargs)


# One row of every fate: (row, its reason; "" = used), for a limit of 40 tokens.
HH = "\n\nHuman: {}\n\nAssistant: {}"
FATES = [
    (text_row(0), ""),
    (text_row(1, weight=0.0), ""),
    ({"prompt": "q", "chosen_response": "a", "rejected_response": "b"}, ""),
    ({"chosen": "I say yes", "rejected": "I say no"}, ""),
    (text_row(2, chosen="no"), "identical"),
    (text_row(3, chosen="no</s>"), "identical"),
    (text_row(4, chosen="x" * 40), "overlong"),
    (text_row(5, tie=True), "tie"),
    ({"context": "q", "response1": "a", "response2": "b", "overall_preference": 0}, "tie"),
    ({"context": "q", "response1": "a", "response2": "b", "overall_preference": 2}, ""),
    ({"chosen": HH.format("a", "b"), "rejected": HH.format("c", "b")}, "different_prompts"),
    ({"chosen": HH.format("a", "b"), "rejected": HH.format("a", "")}, "empty_response"),
]


def run_set(rows, folder, tokenizer=TOKENIZER, **options):
    encode = EncodeOptions(max_total_sequence_length=40, **options.pop("encode", {}))
    return tokenize_set(
        rows,
        "the rows",
        spec=TaskDataSpec(),
        tokenizer=tokenizer,
        options=SetOptions(encode=encode, **options),
        cache_dir=folder,
    )


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.sampled_from(range(len(FATES))), max_size=12))
def test_every_row_is_used_or_dropped_with_its_reason(tmp_path, choice):
    rows, reasons = [FATES[0][0]], [""]
    for index in choice:
        rows.append(FATES[index][0])
        reasons.append(FATES[index][1])
    folder, report = run_set(rows, tmp_path / "sets")
    expected = {reason: reasons.count(reason) for reason in set(reasons) if reason}
    assert report["rows_read"] == len(rows) == report["used"] + sum(report["dropped"].values())
    assert report["dropped"] == expected
    found = TokenizedSet.open(folder)
    assert [pair.row for pair in found] == [i for i, reason in enumerate(reasons) if not reason]
    assert report["zero_weight"] == choice.count(1) == sum(pair.weight == 0 for pair in found)
    for part in ("prompt", "chosen", "rejected"):
        assert report["tokens"][part] == sum(len(getattr(pair, part)) for pair in found)
        assert report["longest"][part] == max(len(getattr(pair, part)) for pair in found)
    longest = max(len(p.prompt) + max(len(p.chosen), len(p.rejected)) for p in found)
    assert report["longest"]["sequence"] == longest


def test_ids_rows_weights_and_order(tmp_path):
    rows = [text_row(0), text_row(1, chosen="no"), text_row(2, weight=2.5)]
    data = prepare({"train_data_path": jsonl(tmp_path / "a.jsonl", rows)})
    expected = [
        TokenizedPair(
            prompt=ids_of(TOKENIZER, "<s>", f"{i}? "),
            chosen=ids_of(TOKENIZER, f"yes {i}", "</s>"),
            rejected=ids_of(TOKENIZER, "no", "</s>"),
            weight=weight,
            row=i,
        )
        for i, weight in ((0, 1.0), (2, 2.5))
    ]
    assert list(data.train) == expected
    assert data.train[-1] == expected[-1]
    lengths = [[len(p.prompt), len(p.chosen), len(p.rejected)] for p in expected]
    assert data.train.lengths().dtype == np.int32
    assert data.train.lengths().tolist() == lengths
    assert data.validation is None and data.report["validation"] is None
    with pytest.raises(IndexError):
        data.train[2]


def test_sets_in_memory_and_on_disk_are_the_same(tmp_path):
    pairs = [
        TokenizedPair(prompt=[1], chosen=[2, 3], rejected=[4], weight=0.5, row=7),
        TokenizedPair(prompt=[5, 6], chosen=[7], rejected=[8, 9, 10], margin=-0.25),
    ]
    with_reference = [
        replace(pairs[0], reference=(-0.1, -7e5)),
        replace(pairs[1], reference=(0, -1)),
    ]
    for expected in (pairs, with_reference):
        made = TokenizedSet.from_pairs(expected)
        made.save(tmp_path)
        opened = TokenizedSet.open(tmp_path)
        assert list(made) == list(opened) == expected
        assert made.has_reference is opened.has_reference is (expected is with_reference)
    assert len(TokenizedSet.from_pairs([])) == 0 and not TokenizedSet.from_pairs([]).has_reference
    with pytest.raises(AssertionError, match="all pairs or none"):
        TokenizedSet.from_pairs([pairs[0], with_reference[1]])


def test_a_set_without_margins_and_reference():
    """As arrays of tokens alone make it."""
    made = TokenizedSet(
        tokens=np.arange(7, dtype=np.int32),
        lengths=np.array([[1, 1, 1], [1, 2, 1]], np.int32),
        weights=np.ones(2, np.float32),
        rows=np.arange(2),
    )
    assert made.margins.tolist() == [0.0, 0.0] and made.margins.dtype == np.float32
    assert np.isnan(made.reference_sums).all() and made.reference_sums.shape == (2, 2)
    assert made[1] == TokenizedPair(prompt=[3], chosen=[4, 5], rejected=[6], row=1)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 3000), st.integers(1, 9), st.floats(-1e6, 0), st.floats(-1e6, 0)),
        min_size=1,
        max_size=4,
    )
)
def test_reference_sums_are_spread_over_their_own_responses(sizes):
    pairs = TokenizedSet.from_pairs(
        TokenizedPair(prompt=[1], chosen=[2] * c, rejected=[3] * r, reference=(chosen, rejected))
        for c, r, chosen, rejected in sizes
    )
    for index, (c, r, *sums) in enumerate(sizes):
        logps = pairs.reference_logps(index)
        assert (logps.shape, logps.dtype) == ((c + r,), np.float64)
        sides = logps[:c], logps[c:]
        assert [math.fsum(side) for side in sides] == pytest.approx(sums, rel=3e-16, abs=1e-300)
        assert all((side == side[0]).all() for side in sides)
    batch = build_packed_batch(
        list(pairs), reference_logps=[pairs.reference_logps(i) for i in range(len(pairs))]
    )
    found = torch.zeros(2 * len(pairs), dtype=torch.float64)
    found.index_add_(0, batch.sequence_id, batch.reference_logps)
    assert found.tolist() == pytest.approx(pairs.reference_sums.ravel().tolist(), rel=1e-12)


def test_any_number_of_workers_gives_the_same_bytes(tmp_path):
    rows = [row for i in range(40) for row in (text_row(i), text_row(i, chosen="no"), FATES[2][0])]
    rows = [row | reference(-i / 7, -1.0) | {"margin": i / 3} for i, row in enumerate(rows)]
    folders = []
    for workers in (1, 3):
        path, _ = run_set(rows, tmp_path / str(workers), num_workers=workers)
        folders.append(path)
    assert folders[0].name == folders[1].name
    files = sorted(path.name for path in folders[0].iterdir())
    assert files == sorted(path.name for path in folders[1].iterdir())
    for name in files:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def test_the_key_follows_what_decides_the_arrays(tmp_path):
    rows = [text_row(0), FATES[2][0], FATES[-2][0]]
    variants = {
        "as it is": {},
        "rows": {"rows": [text_row(1), *rows[1:]]},
        "weight": {"rows": [text_row(0, weight=2), *rows[1:]]},
        "margin": {"rows": [text_row(0, margin=2), *rows[1:]]},
        "reference": {"rows": [row | reference(-1.0, -2.0) for row in rows]},
        "its numbers": {"rows": [row | reference(-1.0, -2.5) for row in rows]},
        "place": {"rows": [rows[1], rows[0], rows[2]]},
        "tokenizer": {"tokenizer": toy_tokenizer(chat_template=CHATML)},
        "template": {"tokenizer": toy_tokenizer(chat_template=CHATML + "x", adds_bos=True)},
        "overlong": {"encode": {"overlong": "truncate_prompt"}},
        "mismatch": {"encode": {"on_boundary_mismatch": "drop"}},
        "variables": {"encode": {"chat_template_kwargs": {"x": 1}}},
        "bad rows": {"on_bad_row": "drop"},
    }
    keys = {}
    for name, change in variants.items():
        path, _ = run_set(**({"rows": rows, "folder": tmp_path} | change))
        keys[name] = path.name
    assert len(set(keys.values())) == len(variants), keys


def test_a_second_run_does_not_tokenize(tmp_path, monkeypatch):
    config = {"train_data_path": jsonl(tmp_path / "a.jsonl", [text_row(i) for i in range(5)])}
    first = prepare(config)
    monkeypatch.setattr(tokenize_set_module, "encode_pairs", None)
    again = prepare(config)
    assert list(again.train) == list(first.train)
    assert (again.report, again.fingerprint) == (first.report, first.fingerprint)
    with pytest.raises(TypeError):  # encode_pairs is None: another length tokenizes anew
        prepare(config, max_total_sequence_length=39)


def test_ties_are_kept_when_asked(tmp_path):
    rows = [text_row(0, tie=True), text_row(1)]
    path = jsonl(tmp_path / "a.jsonl", rows)
    report = prepare({"train_data_path": path, "ties": "keep"}).report["train"]
    assert (report["used"], report["ties_kept"], report["dropped"]) == (2, 1, {})


def test_truncated_and_parted_rows_are_counted(tmp_path):
    tokenizer = toy_tokenizer(merges=[("b", "c")])
    rows = [
        {"prompt": "ab", "chosen": "c", "rejected": "d"},
        {"prompt": "x" * 50, "chosen": "c", "rejected": "d"},
    ]
    config = {"train_data_path": jsonl(tmp_path / "a.jsonl", rows), "overlong": "truncate_prompt"}
    data = prepare(config, tokenizer=tokenizer)
    report = data.report["train"]
    assert (report["boundary_mismatches"], report["truncated"]) == (1, 1)
    assert report["boundary_example"] == {"row": 0, "prompt_end": "b"}
    assert len(data.train[1].prompt) == 38
    text = format_report(data.report)
    assert "In row 0 the prompt's end 'b' is not kept" in " ".join(text.split())


def test_the_printed_report(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [row for row, _ in FATES])
    data = prepare({"train_data_path": path, "val_data_path": path})
    lines = format_report(data.report).splitlines()
    numbers = {
        cells[1].strip(): [cell.strip() for cell in cells[2:4]]
        for cells in (line.replace("\u2503", "\u2502").split("\u2502") for line in lines)
        if len(cells) > 3
    }
    assert numbers["rows"] == ["train", "validation"]
    assert numbers["read"] == ["12", "12"]
    assert numbers["dropped: tie"] == ["2", "2"]
    assert numbers["used"] == ["5", "5"]
    assert any(f"data.val_data_path={path}" in line and "HelpSteer3 rows" in line for line in lines)
    assert json.loads(json.dumps(data.report)) == data.report


# Mistakes


@pytest.mark.parametrize("workers", [1, 3])
def test_mistakes_name_file_row_and_how_many_more(tmp_path, workers):
    rows = [text_row(0), text_row(1, chosen=""), text_row(2), {"prompt": "p"}]
    config = {"train_data_path": jsonl(tmp_path / "a.jsonl", rows), "num_workers": workers}
    with pytest.raises(ValueError) as caught:
        prepare(config)
    assert str(caught.value) == (
        f"data.train_data_path={tmp_path}/a.jsonl, row 1 (counted from 0): the chosen response is "
        "empty; expected text; remove the row; 1 more of 4 rows are wrong, the next is 3"
    )
    rows = [text_row(0), text_row(1, rejected="<s>"), text_row(2, rejected="</s>")]
    with pytest.raises(ValueError, match=r"row 1 \(counted from 0\): the rejected .* next is 2"):
        prepare(config | {"train_data_path": jsonl(tmp_path / "b.jsonl", rows)})
    assert not list((tmp_path / "cache" / "data" / "sets").iterdir())


def test_published_sets_drop_their_bad_rows(tmp_path):
    rows = [text_row(0), text_row(1, chosen=""), text_row(2, rejected="<s>")]
    _, report = run_set(rows, tmp_path, on_bad_row="drop")
    assert report["dropped"] == {"empty_response": 1, "only_special_tokens": 1}


def test_a_set_without_a_usable_row_is_an_error(tmp_path):
    rows = [text_row(i, chosen="no") for i in range(3)]
    with pytest.raises(ValueError, match=r"none of its 3 rows can be used: identical 3; see"):
        prepare({"train_data_path": jsonl(tmp_path / "a.jsonl", rows)})
    good = jsonl(tmp_path / "b.jsonl", [text_row(0)])
    with pytest.raises(ValueError, match=r"data\.val_data_path=.*none of its 3 rows"):
        prepare({"train_data_path": good, "val_data_path": str(tmp_path / "a.jsonl")})
    with pytest.raises(ValueError, match="none of its 0 rows can be used: there are none"):
        run_set([], tmp_path / "sets")


def test_tokenizers_that_lack_what_rows_need(tmp_path):
    text = jsonl(tmp_path / "text.jsonl", [text_row(0)])
    chat = jsonl(tmp_path / "chat.jsonl", [FATES[2][0]])
    bare = toy_tokenizer(has_eos=False)
    with pytest.raises(ValueError, match="has no EOS token"):
        prepare({"train_data_path": text}, tokenizer=bare)
    with pytest.raises(ValueError, match="has no chat template"):
        prepare({"train_data_path": chat}, tokenizer=bare)
    prepare({"train_data_path": chat}, tokenizer=toy_tokenizer(has_eos=False, chat_template=CHATML))


def test_a_damaged_or_poisoned_set_is_refused_and_never_unpickled(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    folder = tmp_path / "set"
    folder.mkdir()
    TokenizedSet.from_pairs([TokenizedPair(prompt=[1], chosen=[2], rejected=[3])]).save(folder)
    np.save(folder / "tokens.npy", np.array([Evil()], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"tokens\.npy cannot be read.*delete"):
        TokenizedSet.open(folder)
    np.save(folder / "tokens.npy", np.array([1.0, 2.0, 3.0]))
    with pytest.raises(ValueError, match="holds float64, expected int32"):
        TokenizedSet.open(folder)
    np.save(folder / "tokens.npy", np.array([1, 2], np.int32))
    with pytest.raises(ValueError, match="holds 2 tokens, expected 3; delete it"):
        TokenizedSet.open(folder)
    assert not (tmp_path / "ran").exists()


def test_a_cache_folder_that_cannot_be_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    config = {"train_data_path": jsonl(tmp_path / "a.jsonl", [text_row(0)])}
    for leads in (True, False):
        with pytest.raises(ValueError, match="set REINFORCER_TP_CACHE to a writable folder"):
            prepare(config, cache_dir=tmp_path / "file" / "deep", is_local_leader=leads)


# The other ranks


def in_processes(tasks) -> list:
    """Each task's result or error, run at the same time in forked processes."""

    def run(task, connection):
        try:
            connection.send(("result", task()))
        except Exception as error:
            connection.send((type(error).__name__, str(error)))

    running = []
    for task in tasks:
        here, there = FORK.Pipe()
        process = FORK.Process(target=run, args=(task, there))
        process.start()
        running.append((process, here))
    results = [here.recv() if here.poll(60) else None for _, here in running]
    for process, _ in running:
        process.join(10)
        assert process.exitcode == 0
    return results


def test_waiting_ranks_get_the_leaders_sets(tmp_path):
    rows = [text_row(i) for i in range(20)]
    config = {
        "train_data_path": jsonl(tmp_path / "a.jsonl", rows),
        "val_data_path": jsonl(tmp_path / "b.jsonl", rows[:3]),
    }

    def rank(leads: bool):
        def task():
            time.sleep(0.5 * leads)  # the others are there first
            data = prepare(config, is_local_leader=leads, run_token="run", timeout_s=30)
            return list(data.train), list(data.validation), data.report, data.fingerprint

        return task

    leader, *others = in_processes([rank(True), rank(False), rank(False)])
    assert leader[0] == "result" and len(leader[1][0]) == 20 and len(leader[1][1]) == 3
    assert others == [leader, leader]


def test_a_users_mistake_reaches_every_rank_at_once(tmp_path):
    config = {"train_data_path": str(tmp_path / "nowhere.jsonl")}

    def rank(leads: bool):
        def task():
            begin = time.monotonic()
            try:
                prepare(config, is_local_leader=leads, run_token="run", timeout_s=30)
            except ValueError as error:
                assert time.monotonic() - begin < 10
                return str(error)

        return task

    results = in_processes([rank(False), rank(True), rank(False)])
    assert results == [results[0]] * 3
    assert "there is no such file" in results[0][1]


def test_other_failures_of_the_leader_are_told(tmp_path):
    def fail():
        raise KeyError("inside")

    def lead():
        return handover.lead(tmp_path, "run", fail)

    results = in_processes([lead, lambda: handover.wait(tmp_path, "run", 30)])
    assert results[0] == ("KeyError", "'inside'")
    assert results[1][0] == "RuntimeError"
    assert "failed to prepare the data with KeyError: 'inside'" in results[1][1]


def killed_leader(folder):
    leader = FORK.Process(
        target=lambda: handover.lead(folder, "run", lambda: os.kill(os.getpid(), 9))
    )
    leader.start()
    leader.join(30)
    return leader


def test_a_leader_that_is_killed_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "/nowhere/none_x/attempt_0/1/error.json")
    leader = killed_leader(tmp_path)
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match=rf"pid {leader.pid}\) ended while it prepared"):
        handover.wait(tmp_path, "run", 30)
    assert time.monotonic() - begin < 5


def test_a_killed_leader_may_be_of_the_launch_before(tmp_path, monkeypatch):
    """Without torchrun, whose launches have names of their own."""
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    killed_leader(tmp_path)

    def lead_late():
        time.sleep(0.5)
        return handover.lead(tmp_path, "run", lambda: "new")

    results = in_processes([lead_late, lambda: handover.wait(tmp_path, "run", 30)])
    assert results == [("result", "new")] * 2
    leader = killed_leader(tmp_path)
    monkeypatch.setattr(handover, "PATIENCE_S", 0.5)
    with pytest.raises(RuntimeError, match=rf"pid {leader.pid}\) ended while it prepared"):
        handover.wait(tmp_path, "run", 30)


def test_a_leader_that_never_comes_is_a_timeout(tmp_path):
    with pytest.raises(RuntimeError, match="waited 0 s for the first process of this node"):
        handover.wait(tmp_path, "run", 0.3)


def test_results_of_earlier_runs_do_not_count(tmp_path, monkeypatch):
    handover.lead(tmp_path, "run", lambda: "old")
    assert handover.wait(tmp_path, "run", 1) == "old"
    monkeypatch.setattr(handover, "_PROCESS_START", time.time() + handover.STALE_S + 5)
    with pytest.raises(RuntimeError, match="waited"):
        handover.wait(tmp_path, "run", 0.3)
    with pytest.raises(RuntimeError, match="waited"):
        handover.wait(tmp_path, "another run", 0.3)


def test_old_files_are_removed(tmp_path):
    handover.lead(tmp_path, "old", lambda: 1)
    os.utime(tmp_path / "old.json", (0, 0))
    handover.lead(tmp_path, "new", lambda: 2)
    assert [path.name for path in tmp_path.iterdir()] == ["new.json"]


def test_the_run_token_is_one_for_local_ranks_and_new_for_each_attempt():
    def token(folder, rank, **extra):
        return handover.run_token(
            {"TORCHELASTIC_RUN_ID": "none", "MASTER_PORT": "29500", **extra}
            | {"TORCHELASTIC_ERROR_FILE": f"{folder}/{rank}/error.json"}
        )

    first = token("/tmp/elastic_a/none_x/attempt_0", 0)
    assert first == token("/tmp/elastic_a/none_x/attempt_0", 1)
    others = [
        token("/tmp/elastic_b/none_x/attempt_0", 0),
        token("/tmp/elastic_a/none_x/attempt_1", 0),
        token("/tmp/elastic_a/none_x/attempt_0", 0, SLURM_JOB_ID="7"),
    ]
    assert len({first, *others}) == 4


# Real data


@pytest.mark.skipif(not ASSETS, reason="REINFORCER_TP_ASSETS is not set")
def test_real_dialogues(tmp_path):
    """hh-rlhf as published and as messages, with a real tokenizer: known counts of odd rows."""
    from reinforcer_tp.data import load_tokenizer

    tokenizer = load_tokenizer(str(Path(ASSETS) / "smollm2_135m_instruct"))
    folder = Path(ASSETS) / "datasets" / "hh_rlhf" / "helpful-base"
    for name in ("test.jsonl.gz", "test.pairs.jsonl.gz"):
        with gzip.open(folder / name) as stream:
            (tmp_path / name[:-3]).write_bytes(b"".join(itertools.islice(stream, 800)))
    data = prepare(
        {
            "train_data_path": str(tmp_path / "test.jsonl"),
            "val_data_path": str(tmp_path / "test.pairs.jsonl"),
        },
        tokenizer=tokenizer,
        max_total_sequence_length=4096,
    )
    train, validation = data.report["train"], data.report["validation"]
    assert train["shapes"] == {"hh-rlhf dialogues (text)": 797}
    assert (train["rows_read"], train["used"]) == (800, 797)
    assert train["dropped"] == {"empty_response": 2, "identical": 1}
    assert (validation["rows_read"], validation["used"]) == (800, 800)
    first = data.train[0]
    assert tokenizer.decode(first.prompt).endswith("\n\nAssistant:")
    assert tokenizer.decode(first.chosen).startswith(" To be honest")
    assert tokenizer.decode(first.chosen).endswith("sorry.<|im_end|>")
    assert tokenizer.decode(data.validation[0].prompt).endswith("<|im_start|>assistant\n")
    assert tokenizer.decode(data.validation[0].chosen).endswith("sorry.<|im_end|>\n")
