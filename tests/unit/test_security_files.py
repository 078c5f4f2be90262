"""Files of others: names stay in their folder, JSON is strict and bounded, no code is asked for."""

import json
import os
import pickle
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from reinforcer_tp.config import load_config
from reinforcer_tp.data.sources import Source, load_rows
from reinforcer_tp.data.tokenized import TokenizedPair, TokenizedSet
from reinforcer_tp.data.tokenizer import load_tokenizer
from reinforcer_tp.hf_files import open_model, read_config, write_companions
from reinforcer_tp.mcore.weights import SafetensorsReader
from reinforcer_tp.untrusted import inside, read_json
from tests.faults.payloads import Evil, code, contents
from tests.faults.poison import Watch
from tests.integration.random_model import make_random_llama, make_tokenizer

DEFAULT = Path(__file__).resolve().parents[2] / "configs" / "dpo.yaml"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return Path(make_random_llama(tmp_path_factory.mktemp("model"), num_hidden_layers=1))


def copy_of(folder: Path, to: Path, **files: str) -> Path:
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    for name, text in files.items():
        (to / name.replace("__", ".")).write_text(text)
    return to


# Names


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/passwd", "a/b", "..", ".", "", "a\0b", "a\\b", "x" * 256, None, 3, ["a"]],
)
def test_names_that_are_no_names_in_the_folder(tmp_path, name):
    with pytest.raises(ValueError, match="expected the name of a file in it"):
        inside(tmp_path, name)


def test_links_out_of_the_folder_and_in_circles(tmp_path):
    folder, secret = tmp_path / "model", tmp_path / "secret"
    folder.mkdir()
    secret.write_text("secret")
    (folder / "file").write_text("x")
    for name, target in {
        "out": secret,
        "relative": "../secret",
        "chain": "out",
        "hidden": "../model/../secret",
    }.items():
        (folder / name).symlink_to(target)
        with pytest.raises(ValueError, match="leads out of its folder"):
            inside(folder, name)
    (folder / "circle").symlink_to("circle")
    with pytest.raises(ValueError, match="circle"):
        inside(folder, "circle")
    (folder / "within").symlink_to("file")
    assert inside(folder, "within").read_text() == "x"
    link = tmp_path / "link"  # a folder that is itself reached by a link
    link.symlink_to(folder)
    assert inside(link, "file").read_text() == "x"


def test_the_hubs_cache_links_to_its_own_blobs_only(tmp_path, model):
    repository = tmp_path / "models--a--b"
    snapshot, blobs = repository / "snapshots" / "1234", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in model.iterdir():
        (blobs / f"hash_{path.name}").write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/hash_{path.name}")
    assert open_model(load_config(str(DEFAULT), ["policy.max_total_sequence_length=64"]),
                      str(snapshot), None).reader.files  # fmt: skip
    assert load_tokenizer(str(snapshot)).get_vocab() == make_tokenizer().get_vocab()
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("../../../other/config.json")
    with pytest.raises(ValueError, match="leads out"):
        read_config(snapshot)
    for path in blobs.iterdir():
        path.unlink()
    blobs.rmdir()
    blobs.symlink_to(model)  # blobs that are elsewhere
    with pytest.raises(ValueError, match="leads out"):
        inside(snapshot, "tokenizer.json")


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "/secret.safetensors",
        "pytorch_model.bin",
        "a\0",
        "link.safetensors",
    ],
)
def test_an_index_names_safetensors_in_its_folder(tmp_path, name):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"w": torch.zeros(1)}, tmp_path / "secret.safetensors")
    (folder / "link.safetensors").symlink_to("../secret.safetensors")
    torch.save({"w": torch.zeros(1)}, folder / "pytorch_model.bin")
    index = {"weight_map": {"w": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"expected|leads out"):
        SafetensorsReader(folder)


@pytest.mark.parametrize("name", ["../other/data.arrow", "/data.arrow", "data.arrow\0"])
def test_saved_rows_stay_in_their_folder(tmp_path, name):
    import datasets

    for folder in ("rows", "other"):
        datasets.Dataset.from_list([{"prompt": folder}]).save_to_disk(tmp_path / folder)
    (tmp_path / "other" / "data-00000-of-00001.arrow").rename(tmp_path / "other" / "data.arrow")
    state = json.loads((tmp_path / "rows" / "state.json").read_text())
    state["_data_files"][0]["filename"] = name
    (tmp_path / "rows" / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="expected the name of a file in it"):
        load_rows(Source(path=str(tmp_path / "rows"), key="data.train_data_path"))


@pytest.mark.parametrize("name", ["numpy objects", "numpy archive", "torch zip", "empty", "zeros"])
def test_a_cached_set_with_another_file_in_it(tmp_path, name):
    pairs = TokenizedSet.from_pairs([TokenizedPair(prompt=[1], chosen=[2], rejected=[3])])
    pairs.save(tmp_path)
    assert TokenizedSet.open(tmp_path)[0].chosen == [2]
    (tmp_path / "rows.npy").write_bytes(contents(tmp_path / "canary")[name])
    with pytest.raises(ValueError, match=r"rows\.npy"):
        TokenizedSet.open(tmp_path)
    assert not (tmp_path / "canary").exists()


# JSON


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[" * 1_000_000, "nested more than 64 deep"),
        ('{"a":' * 1_000_000, "nested more than 64 deep"),
        ('{"a":' * 65 + "1" + "}" * 65, "nested more than 64 deep"),
        ('{"a": 1, "a": 2}', "'a' occurs twice"),
        ('{"a": NaN}', "NaN is not JSON"),
        ('{"a": -Infinity}', "Infinity is not JSON"),
        ('{"a": 1e999}', "too large"),
        ('{"a": ' + "9" * 5000 + "}", "has over 64 bits"),
        ("[]", "holds no JSON object, but list"),
        ("{} {}", "Extra data"),
        ("", "Expecting value"),
        ('{"a": "' + "x" * (1 << 20) + '"}', "larger than 1,048,576 bytes"),
    ],
)
def test_json_that_is_refused(tmp_path, text, says):
    (tmp_path / "config.json").write_text(text)
    begin = time.monotonic()
    with pytest.raises(ValueError, match=says) as caught:
        read_json(tmp_path / "config.json", (2 if len(text) < 6_000 else 6) << 20
                  if "larger" not in says else 1 << 20)  # fmt: skip
    assert time.monotonic() - begin < 2
    assert "config.json" in str(caught.value) and "\n" not in str(caught.value)


def test_pipes_and_missing_files_are_no_json(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "missing", "."):
        with pytest.raises(ValueError, match="is no file"):
            read_json(tmp_path / name)


# Model and tokenizer folders


@pytest.mark.parametrize(
    "change",
    [
        {"auto_map": {"AutoConfig": "evil.Evil"}},
        {"trust_remote_code": True},
        {"_attn_implementation_internal": "evil/kernel"},
        {"_attn_implementation": "evil/kernel"},
        {"attn_implementation": "evil/kernel"},
        {"_experts_implementation_internal": "evil/kernel"},
        {"custom_pipelines": {"a": {}}},
        {"rope_parameters": {"rope_type": "default", "deeper": [{"auto_map": "evil.Evil"}]}},
        {"quantization_config": {"quant_method": "evil"}},
        {"model_type": "evil"},
        {"model_type": ["llama"]},
        {"hidden_size": "64"},
    ],
)
def test_a_config_that_asks_for_more_than_numbers(tmp_path, model, change):
    config = json.loads((model / "config.json").read_text()) | change
    folder = copy_of(model, tmp_path / "m", config__json=json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json") as caught:
        read_config(folder)
    assert next(iter(change)) in str(caught.value) or "auto_map" in str(caught.value)


def test_only_known_fields_reach_the_config_and_the_export(tmp_path, model):
    config = json.loads((model / "config.json").read_text())
    config |= {"attn_implementation": "sdpa", "auto_map": None, "evil_field": "x", "_commit": "y"}
    folder = copy_of(
        model, tmp_path / "m", config__json=json.dumps(config),
        generation_config__json='{"temperature": 0.5}',
    )  # fmt: skip
    options = ["policy.max_total_sequence_length=64"]
    files = open_model(load_config(str(DEFAULT), options), str(folder), None)
    assert not hasattr(files.hf_config, "evil_field")
    (tmp_path / "out").mkdir()
    write_companions(files, make_tokenizer(), "float32", tmp_path / "out")
    assert "evil" not in (tmp_path / "out" / "config.json").read_text()
    assert read_json(tmp_path / "out" / "generation_config.json") == {"temperature": 0.5}
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").symlink_to(DEFAULT)  # would be copied to the export
    with pytest.raises(ValueError, match="leads out"):
        open_model(load_config(str(DEFAULT), options), str(folder), None)


def test_the_config_is_what_transformers_reads(model):
    from transformers import AutoConfig

    theirs, ours = AutoConfig.from_pretrained(model).to_dict(), read_config(model).to_dict()
    names = set(theirs) - {"_name_or_path", "transformers_version"}
    assert {n: theirs[n] for n in names} == {n: ours[n] for n in names}


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.E", None]}}, "auto_map"),
        ("tokenizer_config.json", {"tokenizer_class": "evil.Evil"}, "no tokenizer of transformers"),
        ("tokenizer_config.json", {"tokenizer_class": "Evil"}, "no tokenizer of transformers"),
        ("tokenizer_config.json", {"tokenizer_class": "AutoModelForCausalLM"}, "no tokenizer"),
        ("tokenizer_config.json", {"tokenizer_class": "pipeline"}, "no tokenizer"),
        ("tokenizer_config.json", {"init_inputs": ["x"]}, "init_inputs"),
        ("tokenizer_config.json", {"fast_tokenizer_files": ["../tokenizer.1.json"]}, "name of a"),
        ("config.json", {"auto_map": {"AutoTokenizer": "evil.E"}}, "auto_map"),
        ("config.json", {"tokenizer_class": "Evil"}, "no tokenizer of transformers"),
    ],
)
def test_a_tokenizer_folder_that_asks_for_code(tmp_path, model, file, change, says):
    content = json.loads((model / file).read_text()) | change
    folder = copy_of(model, tmp_path / "t")
    (folder / file).write_text(json.dumps(content))
    (folder / "evil.py").write_text(code(tmp_path / "canary") + "\nclass Evil: pass\nE = Evil")
    with pytest.raises(ValueError, match=says):
        load_tokenizer(str(folder))
    assert not (tmp_path / "canary").exists()


# The audit hook of tests/faults/poison.py sees what it is there for


@pytest.mark.parametrize("what", ["pickle", "compile", "import", "posix_spawn", "subprocess"])
def test_the_audit_hook_sees_executions(tmp_path, what):
    pid = os.fork()  # a hook cannot be removed
    if pid == 0:
        try:
            found = _watched(tmp_path, what)
            os._exit(0 if found else 3)
        finally:
            os._exit(4)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert (tmp_path / "canary").exists()


def _watched(folder: Path, what: str) -> list[str]:
    import runpy
    import subprocess

    source = code(folder / "canary")
    (folder / "evil.py").write_text(source)
    evil = pickle.dumps(Evil(source))
    watch = Watch(folder / "log")
    run = {
        "pickle": lambda: pickle.loads(evil),
        "compile": lambda: runpy.run_path(str(folder / "evil.py")),
        "import": lambda: __import__("evil"),
        "posix_spawn": lambda: os.posix_spawn("/bin/touch", ["touch", str(folder / "canary")], {}),
        "subprocess": lambda: subprocess.run(["touch", str(folder / "canary")], check=True),
    }
    with watch.of(folder, folder / "x"):
        import sys

        sys.path.insert(0, str(folder))
        run[what]()
    if what == "posix_spawn":
        os.wait()
    return watch.found()
