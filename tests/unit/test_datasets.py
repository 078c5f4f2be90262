"""Files, folders and classes -> rows: exact values, and mistakes named with file and line."""

import gzip
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import datasets
import pytest

from reinforcer_tp.data import (
    BinaryPreferenceDataset,
    DPODataset,
    HelpSteer3Dataset,
    PreferenceDataset,
    TaskDataSpec,
    Tulu3PreferenceDataset,
    dataset_classes,
    hub,
    load_preference_dataset,
)
from reinforcer_tp.data.dataset_classes import FileDataset
from reinforcer_tp.data.load import task_spec_of
from reinforcer_tp.data.pairs import drop_nones
from reinforcer_tp.data.shapes import pair_from_row

ROOT = Path(__file__).resolve().parents[2]
MESSAGES = [{"role": "user", "content": "q"}]
# Text that is JSON itself, beside messages in the same column, must stay text.
ROWS = [
    {"prompt": "What is 2+2?", "chosen": "4", "rejected": "5", "weight": 0.12345678901234567},
    {"prompt": MESSAGES, "chosen": "2020-01-01", "rejected": "\u2028 \U0001f600", "weight": 2},
    {"prompt": "4", "chosen": "a\nb", "rejected": "b", "extra": {"deep": [1, None, 2**62, 0.1]}},
    {"prompt": '["x"]', "chosen": "null", "rejected": "true", "extra": '"quoted"'},
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf_cache")


def write(path: Path, rows: list, *, as_list: bool = False) -> str:
    text = json.dumps(rows, indent=1) if as_list else "".join(json.dumps(r) + "\n" for r in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def read(path: str, **kwargs) -> list[dict]:
    """Rows as they were written, without the columns that others have."""
    return [drop_nones(row) for row in FileDataset(path, **kwargs).formatted_ds["train"]]


@pytest.mark.parametrize(
    ("name", "as_list"),
    [(name, False) for name in ("a.jsonl", "a.jsonl.gz", "a.ndjson", "a.json", "a.json.gz")]
    + [("a.json", True), ("a.json.gz", True)],
)
def test_json_files_give_their_exact_values(tmp_path, name, as_list):
    found = list(FileDataset(write(tmp_path / name, ROWS, as_list=as_list)).formatted_ds["train"])
    for row, expected in zip(found, ROWS, strict=True):
        assert {key: row[key] for key in expected} == expected


def test_line_ends_byte_order_mark_and_blank_lines(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"a": "1"}\r\n\n  \r\n{"a": "\\ud83d\\ude00"}')
    assert read(str(tmp_path / "a.jsonl")) == [{"a": "1"}, {"a": "\U0001f600"}]


@pytest.mark.parametrize("name", ["a.parquet", "a.parquet.gz"])
def test_parquet(tmp_path, name):
    rows = [ROWS[0], ROWS[0] | {"chosen": "2020-01-01"}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    if name.endswith("gz"):
        (tmp_path / name).write_bytes(gzip.compress((tmp_path / "a.parquet").read_bytes()))
    assert read(str(tmp_path / name)) == rows


BROKEN = {
    "cut off": (b'{"a": "1"}\n{"a": \n', "line 2: not valid JSON"),
    "no object": (b'{"a": "1"}\n\n["x"]\n', "line 3: got list; expected an object"),
    "NaN": (b'{"a": NaN}', "line 1: not valid JSON (NaN is not JSON)"),
    "a key twice": (b'{"a": "1"}\n{"a": "1", "a": "2"}', "line 2: not valid JSON (the key 'a'"),
    "not UTF-8": (b'{"a": "1"}\n{"a": "\xff"}', "line 2: not valid JSON ('utf-8'"),
    "half a character": (b'{"a": "\\ud800"}', "line 1: not valid JSON ('utf-8'"),
    "65 bits": (b'{"a": 18446744073709551616}', "line 1: not valid JSON (the number 184"),
    "two objects": (b'{"a": "1"} {"a": "1"}', "line 1: not valid JSON (Extra data"),
    "nesting": (b'{"a":' + b"[" * 100_000, "line 1: not valid JSON"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_lines_are_named(tmp_path, name):
    content, said = BROKEN[name]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        FileDataset(str(path))
    assert f"{path}, {said}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_broken_lists_are_named_by_line_and_item(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('[\n{"a": "1"},\n{"a": }\n]')
    with pytest.raises(ValueError, match=r"rows\.json, line 3: not valid JSON"):
        FileDataset(str(path))
    path.write_text('[{"a": "1"}, 2]')
    with pytest.raises(ValueError, match=r"rows\.json, item 1 of the list: got int"):
        FileDataset(str(path))


def test_unreadable_files_are_named(tmp_path):
    good = write(tmp_path / "pairs.jsonl.gz", ROWS)
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(Path(good).read_bytes()[:-20])
    (tmp_path / "no.jsonl.gz").write_bytes(b"not gzip")
    (tmp_path / "no.parquet").write_bytes(b"not parquet")
    (tmp_path / "rows.csv").write_text("a,b")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("x")
    for name, said in (
        ("cut.jsonl.gz", "cannot be read"),
        ("no.jsonl.gz", "cannot be read"),
        ("no.parquet", "cannot be read"),
        ("rows.csv", "cannot read rows.csv"),
        ("empty.jsonl", "no rows"),
        ("folder", "holds no data file"),
        ("pair.jsonl.gz", f"no such file or folder; did you mean {good}?"),
        ("deep/er.jsonl", "no such file or folder"),
    ):
        with pytest.raises(ValueError) as caught:
            FileDataset(str(tmp_path / name))
        assert said in str(caught.value), caught.value
        assert name.split("/")[-1] in str(caught.value)
        assert "\n" not in str(caught.value)


def test_parquet_files_that_break_off_are_named(tmp_path):
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_dict({"a": [f"{i:099d}" for i in range(50_000)]}).to_parquet(path)
    content = bytearray(path.read_bytes())
    content[1000:200_000] = bytes(199_000)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot read .*a\.parquet"):
        FileDataset(str(path))


def test_a_pickle_is_no_data_file(tmp_path):
    (tmp_path / "rows.pkl").write_bytes(
        b"cos\nsystem\n(S'touch " + str(tmp_path).encode() + b"/ran'\ntR."
    )
    with pytest.raises(ValueError, match="expected files that end in"):
        FileDataset(str(tmp_path / "rows.pkl"))
    assert not (tmp_path / "ran").exists()


def named(name: str) -> list[dict]:
    return [{"prompt": name, "chosen": "a", "rejected": "b"}]


def test_folders_and_their_splits(tmp_path):
    folder = tmp_path / "set"
    for name in ("train-00.jsonl", "more/train-01.jsonl.gz", "test.jsonl", "subset/dev.json"):
        write(folder / name, named(name))
    (folder / ".hidden.jsonl").write_text("broken")
    (folder / "README.md").write_text("x")
    prompts = [row["prompt"] for row in read(str(folder))]
    assert prompts == ["more/train-01.jsonl.gz", "train-00.jsonl"]
    assert read(str(folder), split="test") == named("test.jsonl")
    assert read(str(folder), split="train[1:]") == named("train-00.jsonl")
    assert read(str(folder), split="train[:50%]") == named("more/train-01.jsonl.gz")
    assert read(str(folder), subset="subset") == named("subset/dev.json")
    both = FileDataset(str(folder), str(folder)).formatted_ds
    assert list(both["validation"]) == named("subset/dev.json")
    for wrong, said in (
        ({"split": "tset"}, "has the splits test, train, validation; expected tset"),
        ({"split": "train[x"}, "no slice"),
        ({"subset": "none"}, "no folder for data.subset=none"),
    ):
        with pytest.raises(ValueError, match=said.replace("[", r"\[")):
            FileDataset(str(folder), **wrong)
    with pytest.raises(ValueError, match="is a file and has no subsets or splits"):
        FileDataset(str(folder / "test.jsonl"), split="test")


def test_one_file_in_two_parts(tmp_path):
    rows = [*named("one"), *named("two"), *named("three")]
    path = write(tmp_path / "a.jsonl", rows)

    def parts(split, val_split, val_data_path=None):
        config = {"train_data_path": path, "val_data_path": val_data_path}
        config |= {"split": split, "val_split": val_split}
        found = load_preference_dataset(config).formatted_ds
        return [None if part is None else list(part) for part in found.values()]

    assert parts("train[:2]", "train[2:]") == [rows[:2], rows[2:]]
    assert parts("train[:2]", "train[1:2]", path) == [rows[:2], rows[1:2]]  # as it was asked for
    assert parts("train[:2]", None) == [rows[:2], None]
    for split, val_split in (
        (None, "train[2:]"),
        ("train[:2]", "train"),
        ("train[:2]", "train[:2]"),
        ("train[:2]", "train[:1]"),
        ("train[:2]", "train[1:]"),
    ):
        with pytest.raises(ValueError, match=r"share rows.*as in data\.split="):
            parts(split, val_split)
    with pytest.raises(ValueError, match=r"has no subsets or splits; .*set .* and data\.val_split"):
        parts("train[:2]", "test")
    with pytest.raises(ValueError, match=r"data\.val_split=train\[x is no slice"):
        parts("train[:2]", "train[x")
    with pytest.raises(ValueError, match=r"data\.split=.* is no slice \(several parts\)"):
        parts("train[:1]+train[2:]", None)


def test_a_folder_validates_on_the_split_that_is_asked_for(tmp_path):
    for name in ("train", "dev", "test"):
        write(tmp_path / f"{name}.jsonl", named(name))
    config = {"train_data_path": str(tmp_path), "val_split": "test"}
    found = load_preference_dataset(config).formatted_ds
    assert [list(part) for part in found.values()] == [named("train"), named("test")]


def test_saved_datasets(tmp_path):
    rows = datasets.Dataset.from_list(named("saved"))
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=rows, test=rows).save_to_disk(tmp_path / "two")
    assert read(str(tmp_path / "one")) == read(str(tmp_path / "two")) == named("saved")


def test_changed_content_is_read_anew(tmp_path):
    path = write(tmp_path / "a.jsonl", named("one"))
    stat = os.stat(path)
    assert read(path) == named("one")
    write(tmp_path / "a.jsonl", named("two"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # same size, same time
    assert read(path) == named("two")


# Key names


def test_key_mapping(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"q": "p", "good": "a", "bad": "b", "prompt": "other"}])
    keys = {"prompt_key": "q", "chosen_key": "good", "rejected_key": "bad"}
    config = {"dataset_name": "auto", "train_data_path": path, "val_data_path": path, **keys}
    dataset = load_preference_dataset(config)
    for rows in dataset.formatted_ds.values():  # TRL's names: text stays text
        pair = pair_from_row(rows[0])
        assert (pair.prompt, pair.chosen, pair.rejected) == ("p", "a", "b")
    config["dataset_name"] = "BinaryPreferenceDataset"
    pair = pair_from_row(load_preference_dataset(config).formatted_ds["train"][0])
    assert pair.prompt == [{"role": "user", "content": "p"}]
    assert pair.chosen == [{"role": "assistant", "content": "a"}]
    config["chosen_key"] = "godo"
    with pytest.raises(ValueError, match="no column 'godo'; it has q, good, bad, prompt"):
        load_preference_dataset(config)


def test_naming_the_response_keys_keeps_their_meaning(tmp_path):
    rows = [{"q": "p", "chosen_response": "a", "rejected_response": "b"}]
    dataset = FileDataset(
        write(tmp_path / "a.jsonl", rows),
        prompt_key="q",
        chosen_key="chosen_response",
        rejected_key="rejected_response",
    )
    assert pair_from_row(dataset.formatted_ds["train"][0]).is_chat


# Classes


def test_dpo_dataset(tmp_path):
    """The rows of NeMo-RL's own example."""
    rows = [
        {"prompt": "What is 2+2?", "chosen_response": "4", "rejected_response": "5"},
        {"prompt": "What is 3*3?", "chosen_response": "9", "rejected_response": "6"},
    ]
    path = write(tmp_path / "train.jsonl", rows)
    dataset = DPODataset(path, path)
    assert list(dataset.formatted_ds["train"]) == list(dataset.formatted_ds["validation"]) == rows
    assert dataset.task_spec == TaskDataSpec(dataset_name="DPO")
    with pytest.raises(ValueError, match="expected chosen_response and rejected_response too"):
        DPODataset(write(tmp_path / "other.jsonl", named("x")))


def test_preference_and_binary_datasets(tmp_path):
    completions = [{"rank": i, "completion": [{"role": "assistant", "content": c}]}
                   for i, c in ((1, "worse"), (0, "better"))]  # fmt: skip
    path = write(tmp_path / "ranked.jsonl", [{"context": MESSAGES, "completions": completions}])
    dataset = PreferenceDataset(path)
    assert dataset.formatted_ds["validation"] is None
    assert pair_from_row(dataset.formatted_ds["train"][0]).chosen[0]["content"] == "better"
    binary = BinaryPreferenceDataset(write(tmp_path / "b.jsonl", named("p")))
    assert list(binary.formatted_ds["train"]) == [
        {"prompt": "p", "chosen_response": "a", "rejected_response": "b"}
    ]
    with pytest.raises(ValueError, match="expected context and completions too"):
        PreferenceDataset(write(tmp_path / "c.jsonl", named("p")))


def test_published_sets(monkeypatch):
    hub_rows = {
        "nvidia/HelpSteer3": [
            {"domain": "code", "context": MESSAGES, "response1": "one", "response2": "two",
             "overall_preference": preference} for preference in (-2, 0, 2)],
        "allenai/llama-3.1-tulu-3-8b-preference-mixture": [
            {"id": "1", "prompt": "q", "chosen": [*MESSAGES, {"role": "assistant", "content": "a"}],
             "rejected": [*MESSAGES, {"role": "assistant", "content": "b"}]}],
    }  # fmt: skip

    def load(name, subset=None, split=None):
        assert subset == {"nvidia/HelpSteer3": "preference"}.get(name)
        return datasets.DatasetDict(train=datasets.Dataset.from_list(hub_rows[name]))

    monkeypatch.setattr(dataset_classes, "load_hub_dataset", load)
    rows = HelpSteer3Dataset().formatted_ds["train"]
    assert [row["tie"] for row in rows] == [False, True, False]
    assert [row["chosen_response"] for row in rows] == ["one", "two", "two"]
    assert [pair_from_row(row).tie for row in rows] == [False, True, False]
    tulu = load_preference_dataset({"dataset_name": "Tulu3Preference"})
    assert isinstance(tulu, Tulu3PreferenceDataset)
    pair = pair_from_row(tulu.formatted_ds["train"][0])
    assert (pair.prompt, pair.chosen[0]["content"]) == (MESSAGES, "a")
    with pytest.raises(
        ValueError, match=r"data\.train_data_path=x\.jsonl is set, but .*HelpSteer3"
    ):
        load_preference_dataset({"dataset_name": "HelpSteer3", "train_data_path": "x.jsonl"})


CUSTOM = """
    from datasets import load_dataset
    from reinforcer_tp.data import TaskDataSpec

    class CustomDPODataset:
        def __init__(self, train_data_path, val_data_path, prompt_key, chosen_key, rejected_key):
            def rename(row):
                return {
                    "prompt": row[prompt_key],
                    "chosen_response": row[chosen_key],
                    "rejected_response": row[rejected_key],
                }

            def load(path):
                return load_dataset("json", data_files=path, split="train").map(rename)

            self.formatted_ds = {"train": load(train_data_path), "validation": load(val_data_path)}
            self.task_spec = TaskDataSpec(dataset_name="custom_dpo")

    class Everything:
        def __init__(self, train_data_path, **kwargs):
            self.kwargs = kwargs
            self.formatted_ds = {"train": [{"prompt": "p", "chosen": "a", "rejected": "b"}]}

    class Nothing:
        pass

    class NoTrain:
        def __init__(self, val_data_path=None):
            self.formatted_ds = {"validation": []}

    class Demanding:
        def __init__(self, colour):
            self.formatted_ds = {"train": []}
"""


@pytest.fixture
def custom(tmp_path, monkeypatch):
    """A package in the working directory, which is not on sys.path."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "sets.py").write_text(textwrap.dedent(CUSTOM))
    (tmp_path / "mine" / "broken.py").write_text("import not_installed_anywhere")
    (tmp_path / "mine" / "syntax.py").write_text("class:")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    yield "mine.sets"
    for name in [name for name in sys.modules if name.split(".")[0] == "mine"]:
        del sys.modules[name]


def test_a_users_class(custom, tmp_path):
    rows = [{"question": f"{i}+{i}?", "good": str(2 * i), "bad": "?"} for i in range(3)]
    config = {
        "dataset_name": f"{custom}.CustomDPODataset",
        "train_data_path": write(tmp_path / "train.jsonl", rows),
        "val_data_path": write(tmp_path / "val.jsonl", rows[:1]),
        "prompt_key": "question",
        "chosen_key": "good",
        "rejected_key": "bad",
        "num_workers": 1,
    }
    dataset = load_preference_dataset(config)
    assert task_spec_of(dataset, config).dataset_name == "custom_dpo"
    assert [len(dataset.formatted_ds[name]) for name in ("train", "validation")] == [3, 1]
    pair = pair_from_row(dataset.formatted_ds["train"][2])
    assert (pair.prompt, pair.chosen) == (
        [{"role": "user", "content": "2+2?"}],
        [{"role": "assistant", "content": "4"}],
    )


def test_kwargs_get_the_whole_section(custom):
    config = {"dataset_name": f"{custom}.Everything", "train_data_path": "x", "shuffle": True}
    dataset = load_preference_dataset(config)
    assert dataset.kwargs == {"dataset_name": config["dataset_name"], "shuffle": True}
    assert task_spec_of(dataset, config).dataset_name == "Everything"


@pytest.mark.parametrize(
    ("name", "extra", "said"),
    [
        ("mine.sets.Nothing", {}, "has no formatted_ds; expected self.formatted_ds ="),
        ("mine.sets.NoTrain", {}, "formatted_ds = a mapping with validation; expected"),
        ("mine.sets.NoTrain", {"prompt_key": "q"}, "data.prompt_key=q is set, but"),
        ("mine.sets.Demanding", {}, "needs 'colour', which is no key of data"),
        ("mine.sets.Custom", {}, "no class Custom; it has TaskDataSpec, CustomDPODataset"),
        ("mine.nowhere.Custom", {}, "cannot import mine.nowhere (No module named"),
        ("mine.broken.Custom", {}, "cannot import mine.broken (No module named 'not_installed"),
        ("mine.syntax.Custom", {}, "cannot import mine.syntax ("),
        (
            "mine.sets.CustomDPODataset",
            {"train_data_path": "nowhere.jsonl", "val_data_path": "nowhere.jsonl"},
            "its constructor failed with FileNotFoundError: Unable to find",
        ),
        ("HelpSteer4", {}, "is unknown; expected one of auto, DPODataset"),
        ("auto", {}, "data.train_data_path=null; expected a file"),
    ],
)
def test_classes_that_do_not_fit_are_refused(custom, name, extra, said):
    with pytest.raises(ValueError) as caught:
        load_preference_dataset({"dataset_name": name} | extra)
    assert said in str(caught.value)


# The hub


def test_a_hub_that_does_not_answer_is_said_at_once(tmp_path):
    code = (
        "import sys, time\n"
        "from reinforcer_tp.data import load_preference_dataset, load_tokenizer\n"
        "start = time.time()\n"
        "for ask in (lambda: load_preference_dataset({'dataset_name': 'HelpSteer3'}),\n"
        "            lambda: load_preference_dataset({'train_data_path': 'someone/something'}),\n"
        "            lambda: load_tokenizer('someone/some-model')):\n"
        "    try:\n"
        "        ask()\n"
        "    except ValueError as error:\n"
        "        print('ERROR', error)\n"
        "assert time.time() - start < 20\n"
    )
    env = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("ERROR")]
    assert [line.count("onnection refused") > 0 for line in lines] == [True] * 3, done.stdout
    for line, name in zip(lines, ("nvidia/HelpSteer3", "someone/something", "some-model")):
        assert name in line


def test_what_the_hub_says_of_a_name_is_passed_on(monkeypatch):
    monkeypatch.setattr(hub, "hub_problem", lambda name, kind: "401 gated")
    with pytest.raises(ValueError, match=r"someone/secret.*401 gated.*hf auth login"):
        load_preference_dataset({"train_data_path": "someone/secret"})
