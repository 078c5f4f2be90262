"""`python -m reinforcer_tp.plan` as users type it, in this process."""

import dataclasses
import itertools
import json
import math
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

from reinforcer_tp.config import ConfigError, load_config
from reinforcer_tp.data.tokenized import TokenizedPair, TokenizedSet
from reinforcer_tp.plan import __main__ as command
from reinforcer_tp.plan.devices import find_device
from reinforcer_tp.plan.estimate import make_plan
from reinforcer_tp.plan.layout import layout_of
from reinforcer_tp.plan.rows import Assumed, assumed_pairs, rows_of
from reinforcer_tp.plan.search import changed, fixes, quick_plan, search

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a fake rank needs no CUDA")
ROOT = Path(__file__).parents[2]
BIG = str(ROOT / "configs" / "dpo_llama70b.yaml")
SCALE = sorted(set((ROOT / "configs").glob("*.yaml")) - {ROOT / "configs" / "dpo.yaml"})
NO_RATES = dict.fromkeys(("tflops", "memory_gib", "memory_gb_s", "link_gb_s", "network_gb_s"))


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # main() hides the devices from a process of its own; here the variables must come back.
    for name in (
        "CUDA_VISIBLE_DEVICES",
        "TRANSFORMERS_VERBOSITY",
        "HF_DATASETS_DISABLE_PROGRESS_BARS",
    ):
        monkeypatch.setenv(name, "")


@pytest.fixture
def small(tmp_path):
    """A YAML file of a Llama of four layers, planned for in a moment."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 4096,
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    }))  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(
        f"policy: {{model_name: {folder}, precision: bfloat16, train_global_batch_size: 32,\n"
        "  micro_batch_tokens: 2048, max_total_sequence_length: 512}\n"
        f"logger: {{log_dir: {tmp_path / 'run'}}}\n"
        "data: {dataset_name: HelpSteer3}\n"
    )
    return str(path)


def run(capsys, *argv):
    code = command.main([str(each) for each in argv])
    out, err = capsys.readouterr()
    return code, out, err


def test_says_what_each_stage_holds_and_every_assumption(small, capsys):
    code, out, _ = run(
        capsys, "--config", small, "--gpus", 4, "--gpu", "h100", "--price", "2.5",
        "policy.megatron_cfg.pipeline_model_parallel_size=2",
    )  # fmt: skip
    assert code == 0
    for text in (
        "tp=1 pp=2 dp=2 on 4 x H100 SXM 80GB", "fits", "forward and backward", "pipeline bubble",
        "matrix products", "GPU-hours", "at 2.5 a GPU-hour", "means of 400 prompt and 300 response",
        "989 TFLOP/s x 0.65", "the reference's sweep",
    ):  # fmt: skip
        assert text in out, text


def test_json_holds_the_same_numbers(small, capsys):
    _, out, _ = run(capsys, "--config", small, "--gpus", 4, "--gpu", "h100", "--json")
    plan = json.loads(out)
    assert plan["layout"]["data_parallel_size"] == 4
    [stage] = plan["stages"]
    assert stage["parameter_bytes"] == 2 * stage["parameters"]
    parts = [
        v for k, v in plan["time"].items() if k.endswith("_s") and k not in ("step_s", "sweep_s")
    ]
    assert sum(parts) == pytest.approx(plan["time"]["step_s"], rel=1e-6)
    seconds = plan["steps"] * plan["time"]["step_s"] + plan["time"]["sweep_s"]
    assert plan["hours"] == pytest.approx(seconds / 3600)
    assert plan["gpu_hours"] == pytest.approx(4 * plan["hours"])


def test_too_small_a_card_exits_1_and_the_fix_it_names_fits(small, capsys):
    big = ("policy.max_total_sequence_length=1024", "policy.micro_batch_tokens=16384")
    card = ["--gpu", "mine", "--tflops", 100, "--memory-gb-s", 1000, "--link-gb-s", 50]
    card += ["--memory-gib", 3.4, "--config", small, "--gpus", 2, "--response-tokens", 900]
    code, out, _ = run(capsys, *card, *big)
    assert code == 1 and "DOES NOT FIT" in out
    [fix] = [line for line in out.splitlines() if line.startswith("cheapest fix: ")]
    code, out, _ = run(capsys, *card, *big, *shlex.split(fix.removeprefix("cheapest fix: ")))
    assert code == 0, out
    assert ": fits" in out


def test_where_nothing_helps_it_says_so(small, capsys):
    card = ("--gpu", "tiny", "--tflops", 1, "--memory-gb-s", 10, "--link-gb-s", 1)
    code, out, _ = run(capsys, "--config", small, "--gpus", 1, *card, "--memory-gib", 0.5)
    assert code == 1
    assert "no layout of 1 x tiny holds it" in out and "--gpus" in out


@pytest.mark.parametrize(
    "argv, expected",
    [
        (["--gpu", "h1000"], "--gpu=h1000 is not known; expected one of a100, "),
        (["--gpu", "h1000"], "--tflops --memory-gib --memory-gb-s --link-gb-s"),
        (["--tflops", "-1"], "--tflops=-1: expected a number above 0"),
        (["--gpus", "0"], "--gpus=0: expected at least 1"),
        (["--gpus", "12"], "--gpus=12 is no multiple of 8 GPUs of a node"),
        (["--efficiency", "1.5"], "--efficiency=1.5: expected more than 0"),
        (["--headroom", "1"], "--headroom=1: expected from 0 to below 1"),
        (["policy.megatron_cfg.tensor_model_parallel_size=3"], "does not divide"),
        (["policy.megatron_cfg.pipeline_model_parallel_size=5"], "pipeline_model_parallel_size=5"),
        (
            ["--gpus", "16", "policy.megatron_cfg.tensor_model_parallel_size=16",
             "policy.megatron_cfg.pipeline_model_parallel_size=1"],
            "tensor_model_parallel_size=16",
        ),
        (["policy.micro_batch_token=2"], "did you mean policy.micro_batch_tokens"),
        (["--compare", "/nowhere"], "there is no config.yaml"),
        (["policy.model_name=nobody/nothing-here"], "nobody/nothing-here"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_code_78(capsys, argv, expected):
    given = [] if "--compare" in argv else ["--config", BIG]
    code, _, err = run(capsys, *given, *argv)
    assert code == 78
    assert expected in err and err.startswith("error: ") and err.count("\n") == 1
    assert "Traceback" not in err


def test_a_tensor_parallel_group_must_not_span_nodes(capsys):
    code, _, err = run(capsys, "--config", BIG, "--gpus", 64, "--gpus-per-node", 4)
    assert code == 78 and "spans nodes of 4 GPUs" in err


@pytest.mark.parametrize(
    "name, known",
    [
        ("NVIDIA H100 80GB HBM3", "H100 SXM 80GB"),
        ("NVIDIA H100 PCIe", "H100 PCIe 80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100 SXM 40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 SXM 80GB"),
        ("NVIDIA H200", "H200 SXM 141GB"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090 24GB"),
        ("h100", "H100 SXM 80GB"),
    ],
)
def test_cards_are_known_as_torch_names_them(name, known):
    assert find_device(name, NO_RATES).name == known


def test_given_rates_win_over_known_ones():
    device = find_device("h100", NO_RATES | {"tflops": 500.0})
    assert device.tflops == 500.0 and device.memory_gb_s == 3350


def subject_of(small, world_size, *overrides, gpu="h100", memory_gib=None):
    arguments = command.parse_arguments(["--config", small, "--gpus", str(world_size), *overrides])
    config = load_config(small, list(overrides))
    config = command.on_cluster(config, world_size, min(world_size, 8))
    device = find_device(gpu, NO_RATES | {"memory_gib": memory_gib})
    per_node = min(world_size, 8)
    return config, command.open_subject(config, arguments, device, world_size, per_node)


def test_search_agrees_with_building_every_stage(small):
    """One and two layers and a straight line, against the whole thing."""
    config, subject = subject_of(small, 4)
    found = [each for each in search(config, subject) if each.plan is not None]
    shapes = {(c.plan.layout.tp_size, c.plan.layout.pp_size, c.plan.layout.vpp_size) for c in found}
    assert {(1, 1, 1), (2, 1, 1), (4, 1, 1), (1, 2, 2), (2, 2, 1), (1, 4, 1)} <= shapes
    for candidate in found[::7]:
        whole = make_plan(changed(config, candidate.overrides), subject)
        assert candidate.plan.peak_gib == pytest.approx(whole.peak_gib, rel=0.02)
        assert candidate.plan.time.step_s == pytest.approx(whole.time.step_s, rel=0.05)
        quick, built = candidate.plan.works, whole.works
        assert [w.num_parameters for w in quick] == [w.num_parameters for w in built]


@pytest.mark.parametrize("path", SCALE, ids=lambda path: path.stem)
def test_configurations_that_ship_fit_their_cluster(path):
    """On 80 GB cards, a tenth of them free; layers counted from one and two."""
    config = load_config(str(path), [])
    world_size = config.planned_world_size
    per_node = config.cluster.gpus_per_node or 8
    world_size = world_size if config.cluster.gpus_per_node else 8
    config, subject = subject_of(str(path), world_size)
    assert subject.gpus_per_node == per_node
    candidate = quick_plan(config, subject)
    assert candidate.plan is not None, candidate.refusal
    assert candidate.plan.fits, candidate.plan.peak_gib


def test_fixes_change_what_they_say(small):
    config, subject = subject_of(small, 2, "policy.kernel_cache_mib=64")
    before = make_plan(config, subject)
    found = {str(each.overrides): each.plan for each in itertools.islice(fixes(config, subject), 5)}
    assert (
        "{'policy.kernel_cache_mib': 0}" in found and "{'policy.micro_batch_tokens': 1024}" in found
    )
    kept = [chunk.head_forward.saved_bytes for chunk in before.works[0].chunks]
    [work] = found["{'policy.kernel_cache_mib': 0}"].works
    assert work.chunks[0].head_forward.saved_bytes < kept[0]
    full = found["{'policy.megatron_cfg.activation_checkpointing': True}"]
    assert full.memories[0].activations < before.memories[0].activations / 2


def test_rows_of_the_users_own_lengths(small):
    """Tokens, micro-batches and FLOPs of a step of known pairs, by hand."""
    config = load_config(small, ["policy.train_global_batch_size=4"])
    _, subject = subject_of(small, 1)
    pair = TokenizedPair(prompt=[1] * 100, chosen=[2] * 50, rejected=[3] * 30)
    pairs = TokenizedSet.from_pairs([dataclasses.replace(pair, row=i) for i in range(4)])
    rows = rows_of(config, subject.shape, layout_of(config, 4, 1, 1), pairs, "mine")
    assert rows.step_tokens == 4 * 180 and rows.micro_batches == 1 and rows.row_tokens == 720
    layer = 512 * (2 * 512 + 2 * 256) + 3 * 512 * 1024
    visible = 150 * 151 / 2 + 130 * 131 / 2 - 100 * 101 / 2
    attention = 3 * 4 * 4 * 512 * visible
    head = 6 * 512 * 4096 * 80
    assert rows.step_flops == pytest.approx(4 * (6 * 4 * layer * 180 + head + attention))
    assert rows.attention_share == pytest.approx(4 * attention / rows.step_flops)
    assert rows.head_share == pytest.approx(4 * head / rows.step_flops)
    assert len(rows.longest.labels) == 4 * 80
    assert rows.sweep_tokens == 4 * 180


def test_a_pair_that_fits_no_row_is_refused(small):
    config = load_config(small, ["policy.micro_batch_tokens=300"])
    _, subject = subject_of(small, 1)
    pairs = assumed_pairs(Assumed(num_pairs=100), 512)
    with pytest.raises(ValueError, match=r"policy\.micro_batch_tokens=300"):
        rows_of(config, subject.shape, layout_of(config, 4, 1, 1), pairs, "assumed")


def test_assumed_lengths_have_the_means_that_are_stated():
    pairs = assumed_pairs(Assumed(num_pairs=50_000), 100_000)
    assert len(pairs) == 50_000
    assert pairs.lengths().mean(axis=0) == pytest.approx(np.array([400, 300, 300]), rel=0.02)
    capped = assumed_pairs(Assumed(), 512).lengths()
    assert (capped[:, 0] + capped[:, 1:].max(axis=1)).max() <= 512 and capped.min() >= 1


def test_the_embedded_data_are_read(tmp_path, capsys):
    code, out, _ = run(
        capsys, "--config", ROOT / "configs" / "dpo.yaml", "--gpu", "cpu", "--gpus", 2
    )
    assert code == 0
    assert "the 960 pairs of" in out and "on 2 x CPU" in out


def test_a_changed_section_checks_itself(small):
    with pytest.raises(ConfigError):
        changed(load_config(small, []), {"policy.train_global_batch_size": 0})
    assert math.isclose(changed(load_config(small, []), {"dpo.seed": 7}).dpo.seed, 7)
