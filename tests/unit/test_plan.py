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
from reinforcer_tp.plan import timing
from reinforcer_tp.plan.devices import find_device
from reinforcer_tp.plan.estimate import make_plan
from reinforcer_tp.plan.layout import Layout, layout_of
from reinforcer_tp.plan.rows import Assumed, assumed_pairs, rows_of
from reinforcer_tp.plan.search import Probes, _candidate, changed, fixes, layouts

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a fake rank needs no CUDA")
ROOT = Path(__file__).parents[2]
BIG = str(ROOT / "configs" / "dpo_llama70b.yaml")
SMALL = {ROOT / "configs" / f"{name}.yaml" for name in ("dpo", "dpo_smollm2")}
SCALE = sorted(set((ROOT / "configs").glob("*.yaml")) - SMALL)
MEGATRON = "policy.megatron_cfg"
NO_OVERLAP = [
    f"{MEGATRON}.distributed_data_parallel_config.{key}=false"
    for key in ("overlap_grad_reduce", "overlap_param_gather")
]
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
        (["--tflops", "-1"], "--tflops=-1: expected a finite number above 0"),
        (["--gpus", "0"], "--gpus=0: expected at least 1"),
        (["--gpus", "12"], "--gpus=12 is no multiple of 8 GPUs of a node"),
        (["--efficiency", "1.5"], "--efficiency=1.5: expected more than 0"),
        (["--headroom", "1"], "--headroom=1: expected from 0 to below 1"),
        (["--price", "nan"], "--price=nan: expected a finite number from 0"),
        (["--memory-gib", "inf"], "--memory-gib=inf: expected a finite number above 0"),
        (["--gpu", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"], "is not known"),
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


def test_no_tokens_are_lost_between_whole_micro_batches(small):
    """6 x weights x tokens with padding / rate, whatever the mean number of micro-batches."""
    layer = 512 * (2 * 512 + 2 * 256) + 3 * 512 * 1024
    fractions = set()
    for tokens in (1500, 2100, 2500, 2900):
        config, subject = subject_of(small, 2, f"policy.micro_batch_tokens={tokens}")
        plan = make_plan(config, subject)
        rate = 989e12 * subject.efficiency.matrices
        slots = plan.rows.row_tokens * plan.rows.micro_batches
        assert slots * 2 == pytest.approx(plan.rows.step_tokens, rel=0.01)
        expected = 6 * 4 * layer * slots / rate
        assert plan.time.matrices_s == pytest.approx(expected, rel=1e-6)
        fractions.add(plan.rows.micro_batches % 1)
    assert any(fractions), "whole numbers would not show it"


@pytest.mark.parametrize("count", [3.0, 3.25, 3.75, 4.0])
def test_a_pipeline_pays_for_the_mean_number_of_micro_batches(count):
    """(m + p - 1) (f + b), also where m is a mean."""
    layout = Layout(
        world_size=4, gpus_per_node=8, tp_size=1, pp_size=4, vpp_size=1, dp_size=1,
        stage_layers=(1,) * 4,
    )  # fmt: skip
    seconds = [[(1.0, 2.0)]] * 4
    assert timing._between_counts(layout, count, seconds, 0.0) == pytest.approx((count + 3) * 3)


@pytest.mark.parametrize("tp, adapters", [(1, 8), (2, 4), (8, 1)])
def test_a_group_uses_the_adapters_of_all_its_ranks(tp, adapters):
    """8 nodes: with tp=1 eight ranks of a data-parallel group stand on each, with tp=8 one."""
    layout = Layout(
        world_size=64, gpus_per_node=8, tp_size=tp, pp_size=1, vpp_size=1, dp_size=64 // tp,
        stage_layers=(1,),
    )  # fmt: skip
    clock = timing._Clock(find_device("h100", NO_RATES), timing.Efficiency(), layout, "bfloat16")
    rate = 0.7 * min(450e9, adapters * 50e9)
    found = clock.collective_s("reduce_scatter_tensor_coalesced_", layout.dp_size, 1e9)
    assert found == pytest.approx(1e9 * (1 - tp / 64) / rate)


def test_overlap_hides_what_it_says(small):
    times = []
    for options in ((), NO_OVERLAP):
        config, subject = subject_of(small, 16, *options)
        times.append(make_plan(config, subject).time)
    hidden, open_ = times
    assert open_.data_parallel_s > hidden.data_parallel_s
    assert open_.optimizer_s == pytest.approx(hidden.optimizer_s)  # the gather is no part of it


def test_search_agrees_with_building_every_stage(small):
    """One and two layers and a straight line, against the whole thing."""
    config, subject = subject_of(small, 4)
    every = [changed(config, overrides) for overrides in layouts(config, subject)]
    sizes = {
        (
            each.policy.megatron_cfg.tensor_model_parallel_size,
            each.policy.megatron_cfg.pipeline_model_parallel_size,
            each.policy.megatron_cfg.virtual_pipeline_model_parallel_size,
        )
        for each in every
    }
    assert {
        (1, 1, None),
        (2, 1, None),
        (4, 1, None),
        (1, 2, 2),
        (2, 2, None),
        (1, 4, None),
    } <= sizes
    probes = Probes()
    few = [
        {},
        {f"{MEGATRON}.pipeline_model_parallel_size": 4},
        *list(layouts(config, subject))[4::9],
    ]
    for candidate in (_candidate(config, subject, overrides, probes) for overrides in few):
        whole = make_plan(changed(config, candidate.overrides), subject)
        assert candidate.plan.peak_gib == pytest.approx(whole.peak_gib, rel=0.02)
        assert candidate.plan.time.step_s == pytest.approx(whole.time.step_s, rel=0.05)
        quick, built = candidate.plan.works, whole.works
        assert [w.num_parameters for w in quick] == [w.num_parameters for w in built]


def test_a_search_as_json(small, capsys):
    code, out, _ = run(capsys, "--config", small, "--gpus", 2, "--search", "--json")
    found = json.loads(out)
    assert code == 0 and any(each.get("fits") for each in found)
    assert all("step_s" in each or each["refusal"] for each in found)


@pytest.fixture
def a_run(tmp_path, small):
    """The folder of a run on one CPU process, as far as --compare reads it."""
    folder = tmp_path / "finished"
    folder.mkdir()
    (folder / "config.yaml").write_text(Path(small).read_text())
    environment = {"world_size": 1, "num_nodes": 1, "devices": ["cpu (2 cores, x86_64, EPYC)"]}
    (folder / "environment.json").write_text(json.dumps(environment))
    line = {"step": 1, "perf/step_s": 2.0, "memory/peak_gib": 1.5, "memory/before_model_gib": 0.5}
    lines = [line, {"step": 1, "validation/loss": 1.0}, {**line, "step": 2, "perf/step_s": 1.0}]
    text = "".join(json.dumps(each) + "\n" for each in lines) + '{"step": 3, "perf/st'
    (folder / "metrics.jsonl").write_text(text)
    return folder


def test_a_run_beside_its_plan(a_run, capsys):
    """The card is the run's; a last line that is torn off counts for nothing."""
    code, out, err = run(capsys, "--compare", a_run, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["measured"] == {"step_s": 1.0, "peak_gib": 1.0} and found["steps"] == 2
    assert found["ratio"]["peak_gib"] == pytest.approx(found["predicted"]["peak_gib"])
    _, out, _ = run(capsys, "--compare", a_run)
    assert "on 1 x CPU" in out and "assumed:" in out


@pytest.mark.parametrize(
    "name, text, expected",
    [
        ("environment.json", "{}", "environment.json has world_size=None"),
        (
            "environment.json",
            '{"world_size": 7, "num_nodes": 2, "devices": ["cpu"]}',
            "num_nodes=2",
        ),
        (
            "environment.json",
            '{"world_size": 1, "num_nodes": 0, "devices": ["cpu"]}',
            "num_nodes=0",
        ),
        ("metrics.jsonl", "5\n", "line 1 of "),
        ("metrics.jsonl", '{"perf/step_s": 1.0}\n', "line 1 of "),
        ("metrics.jsonl", '{"perf/step_s": 1, "memory/peak_gib": "x"}\n', "line 1 of "),
        ("metrics.jsonl", '{"perf/step_s": 0, "memory/peak_gib": 0}\n' * 2, "above 0"),
        ("metrics.jsonl", "", "has 0 steps"),
        ("metrics.jsonl", "\udcff\n", "line 1 of "),
        ("config.yaml", "policy: [1, 2", "config.yaml"),
    ],
)
def test_damaged_runs_are_named(a_run, capsys, name, text, expected):
    (a_run / name).write_bytes(text.encode(errors="surrogateescape"))
    code, _, err = run(capsys, "--compare", a_run)
    assert code == 78 and expected in err and err.count("\n") == 1, err


def test_a_cpu_run_is_not_compared_with_a_card(a_run, capsys):
    code, _, err = run(capsys, "--compare", a_run, "--gpu", "h100")
    assert code == 78 and "ran on cpu" in err


@pytest.mark.parametrize("path", SCALE, ids=lambda path: path.stem)
def test_configurations_that_ship_fit_their_cluster(path):
    """On 80 GB cards, a tenth of them free; layers counted from one and two."""
    config = load_config(str(path), [])
    world_size = config.planned_world_size
    per_node = config.cluster.gpus_per_node or 8
    world_size = world_size if config.cluster.gpus_per_node else 8
    config, subject = subject_of(str(path), world_size)
    assert subject.gpus_per_node == per_node
    candidate = _candidate(config, subject, {}, Probes())
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
    rows = rows_of(config, subject.shape, layout_of(config, 4, 1, 1), pairs)
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
        rows_of(config, subject.shape, layout_of(config, 4, 1, 1), pairs)


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
