"""What makes data quick changes no number: pieces, batches, and the record of an earlier start."""

import gzip
import json
import os
from itertools import islice
from pathlib import Path

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers, pre_tokenizers

from benchmarks import data_speed
from reinforcer_tp.data import load_tokenizer, prepare
from reinforcer_tp.data.chat import EncodeOptions, PairEncoder
from reinforcer_tp.data.pieces import PieceTokenizer
from reinforcer_tp.data.shapes import pair_from_row
from reinforcer_tp.data.tokenize_set import each_row
from tests.unit.test_prepare import (  # own_cache is a fixture of every test here
    jsonl,
    own_cache,  # noqa: F401
    text_row,
)
from tests.unit.test_prepare import (
    prepare as prepare_rows,
)
from tests.unit.toy_tokenizer import CHATML, toy_tokenizer

ASSETS = os.environ.get("REINFORCER_TP_ASSETS")
needs_assets = pytest.mark.skipif(not ASSETS, reason="REINFORCER_TP_ASSETS is not set")


# Pieces


def variant(name: str):
    tokenizer = toy_tokenizer(merges=[("a", "b"), ("b", "ab")], adds_bos=True)
    backend = tokenizer.backend_tokenizer
    if name == "blanks go to a token":
        tokenizer.add_tokens([AddedToken("<x>", lstrip=True, normalized=False)])
    if name == "whole words only":
        tokenizer.add_tokens([AddedToken("ab", single_word=True, normalized=False)])
    if name == "a blank before the first word":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    if name == "a blank before every piece":
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("a"), normalizers.Replace(" ", "b")]
        )
    if name == "tokens within tokens":
        tokenizer.add_tokens(
            [AddedToken("</s></s>", normalized=False), AddedToken("b<", special=True)]
        )
    return tokenizer


VARIANTS = {  # name -> whether its texts are cut
    "plain": True,
    "a blank before every piece": True,
    "tokens within tokens": True,
    "blanks go to a token": False,
    "whole words only": False,
    "a blank before the first word": False,
}
TOKENIZERS = {name: variant(name) for name in VARIANTS}
PARTS = st.sampled_from(["<s>", "</s>", "<x>", "a", "b", "ab", " ", "<", "s>", "\n", "\u00e9", ""])


@pytest.mark.parametrize("name", VARIANTS)
@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.lists(PARTS, max_size=8).map("".join), max_size=5))
def test_ids_of_pieces_are_those_of_whole_texts(name, texts):
    tokenizer = TOKENIZERS[name]
    found = PieceTokenizer(tokenizer)(texts)
    assert found == [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


@pytest.mark.parametrize("name", VARIANTS)
def test_texts_are_cut_where_pieces_stand_alone(name):
    assert (PieceTokenizer(TOKENIZERS[name])._borders is not None) == VARIANTS[name]


def test_what_an_earlier_call_left_in_the_tokenizer_does_not_matter():
    tokenizer = toy_tokenizer(adds_bos=True)
    pieces, text = PieceTokenizer(tokenizer), "<s>abcabc</s>ab"
    expected = tokenizer(text, add_special_tokens=False)["input_ids"]
    tokenizer(["a", "abc"], truncation=True, max_length=2)
    assert tokenizer.backend_tokenizer.truncation is not None
    assert pieces([text, "a"])[0] == expected


@needs_assets
@pytest.mark.parametrize(
    "file", ["rasbt_polite/all.pairs.jsonl.gz", "hh_rlhf/helpful-base/test.pairs.jsonl.gz"]
)
def test_real_rows_are_the_ids_of_apply_chat_template(file):
    """In the slow way: the template's three texts, each tokenized whole, cut at what they share."""
    tokenizer = load_tokenizer(str(Path(ASSETS) / "smollm2_135m_instruct"))
    with gzip.open(Path(ASSETS) / "datasets" / file) as stream:
        rows = [json.loads(line) for line in islice(stream, 300)]
    pairs = [pair_from_row(row) for row in rows]
    for row, found in zip(rows, PairEncoder(tokenizer, EncodeOptions()).encode(pairs), strict=True):
        ask = tokenizer.apply_chat_template
        prompt = ask(row["prompt"], add_generation_prompt=True, return_dict=False)
        chosen, rejected = (
            ask(row["prompt"] + row[side], return_dict=False) for side in ("chosen", "rejected")
        )
        shared = 0
        while shared < len(prompt) and prompt[shared] == chosen[shared] == rejected[shared]:
            shared += 1
        expected = (prompt[:shared], chosen[shared:], rejected[shared:])
        assert (found.prompt, found.chosen, found.rejected) == expected


# Rows by the batch


def test_rows_of_a_dataset_by_the_batch_are_those_one_by_one():
    columns = {"a": datasets.Json(), "b": datasets.Value("string"), "c": datasets.Value("float64")}
    values = [[{"x": None, "y": [1, 2.5]}], "4", 7, None]
    rows = datasets.Dataset.from_dict(
        {"a": [json.dumps(v) for v in values] * 200, "b": ["x", None] * 400, "c": [0.1] * 800},
        features=datasets.Features(columns),
    )
    assert list(each_row(rows)) == list(rows)
    assert list(each_row(rows.select([5, 2]))) == [rows[5], rows[2]]
    assert list(each_row([{"a": 1}, "no row"])) == [{"a": 1}, "no row"]


# The record of an earlier start


def test_a_second_start_reads_no_row(tmp_path, monkeypatch):
    config = {"train_data_path": jsonl(tmp_path / "a.jsonl", [text_row(i) for i in range(5)])}
    first = prepare_rows(config)
    monkeypatch.setattr(prepare, "load_preference_dataset", None)
    again = prepare_rows(config | {"num_workers": 3})
    assert list(again.train) == list(first.train)
    assert (again.report, again.fingerprint) == (first.report, first.fingerprint)


@pytest.mark.parametrize("change", ["content", "settings", "tokenizer", "prompt", "set", "record"])
def test_a_start_that_may_differ_reads_the_rows(tmp_path, monkeypatch, change):
    def config() -> dict:
        prompt = tmp_path / "prompt.txt"
        prompt.write_text("{} now?" if content["prompt"] else "{}?")
        return {
            "train_data_path": jsonl(tmp_path / "a.jsonl", [text_row(0, chosen=content["chosen"])]),
            "prompt_file": str(prompt),
        }

    content, more = {"chosen": "yes", "prompt": False}, {}
    first = prepare_rows(config())
    cache = tmp_path / "cache" / "data"
    [record] = (cache / "starts").iterdir()
    stat = os.stat(tmp_path / "a.jsonl")
    if change == "content":
        content["chosen"] = "yep"  # as long as before, and at the same time
    elif change == "prompt":
        content["prompt"] = True
    elif change == "settings":
        more["max_total_sequence_length"] = 39
    elif change == "tokenizer":
        more["tokenizer"] = toy_tokenizer(chat_template=CHATML)
    elif change == "set":
        [folder] = (cache / "sets").iterdir()
        folder.rename(tmp_path / "away")
    else:
        record.write_text(record.read_text()[:-9])
    section = config()
    os.utime(tmp_path / "a.jsonl", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    calls, real = [], prepare.load_preference_dataset
    monkeypatch.setattr(
        prepare, "load_preference_dataset", lambda section: (calls.append(1), real(section))[1]
    )
    again = prepare_rows(section, **more)
    assert calls
    assert (list(again.train) == list(first.train)) == (change in ("settings", "set", "record"))


def test_rows_of_a_class_are_read_at_every_start(tmp_path, monkeypatch):
    """Nothing says that they are as they were."""
    (tmp_path / "own_rows.py").write_text(
        "COUNT = [0]\n"
        "class Mine:\n"
        "    def __init__(self):\n"
        "        COUNT[0] += 1\n"
        "        row = {'prompt': 'q', 'chosen': f'a{COUNT[0]}', 'rejected': 'b'}\n"
        "        self.formatted_ds = {'train': [row]}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    sets = [prepare_rows({"dataset_name": "own_rows.Mine"}).train for _ in range(2)]
    assert list(sets[0]) != list(sets[1])


# The benchmark


def test_the_benchmark_measures_and_counts(tmp_path, capsys):
    case = "--rows 400 --sizes 400 --pairs 16 --workers 2 --results"
    code = data_speed.main([*case.split(), str(tmp_path / "results")])
    [file] = (tmp_path / "results").iterdir()
    row = json.loads(file.read_text())
    missed = "missed" in capsys.readouterr().out
    assert code == (3 if missed else 0)
    assert set(row["pairs_per_s"]) == {"1", "2"} and min(row["pairs_per_s"].values()) > 0
    assert set(row["peak_bytes"]) == {"400"}
    assert 20 < row["tokens_per_pair"] < 400
    assert row["batch_ms"]["median"] * 20 < row["pack_epoch_s"] * 1e3
