"""`policy.fp8` without a GPU: what Megatron is told, how rows are cut, what is refused and when."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from megatron.core.extensions import transformer_engine as engine
from packaging.version import Version

from reinforcer_tp.batches import micro_batching
from reinforcer_tp.config import ConfigError, decisive, fingerprint, load_config, validate_model
from reinforcer_tp.data.micro_batches import micro_batches
from reinforcer_tp.data.tokenized import TokenizedPair, TokenizedSet
from reinforcer_tp.mcore.extensions import check_fp8
from reinforcer_tp.mcore.model import block_spec, transformer_config
from reinforcer_tp.mcore.shape import ModelShape
from reinforcer_tp.train import check

MEGATRON = "policy.megatron_cfg"
CONFIGS = Path(__file__).resolve().parents[2] / "configs"
CUDA = torch.device("cuda")
SHAPE = ModelShape(
    architecture="LlamaForCausalLM",
    num_layers=8,
    hidden_size=64,
    ffn_hidden_size=128,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=67,
    norm_eps=1e-5,
    tied=False,
    qkv_bias=False,
    qk_norm=False,
    initializer_range=0.02,
    max_positions=4096,
)


def load(*overrides):
    return load_config(None, ["policy.model_name=m", *overrides])


def layout(tp=1, pp=1, dp=1, **changes):
    """What a topology says of sizes; no process group."""
    sizes = {"tp_size": tp, "pp_size": pp, "vpp_size": 1, "dp_size": dp, "dp_rank": 0}
    sizes |= {"micro_batch_multiple": 1, "device": torch.device("cpu")}
    return SimpleNamespace(**(sizes | changes))


def megatron_config(*overrides):
    policy = load(*overrides).policy
    return transformer_config(
        SHAPE, policy.megatron_cfg, dtype=torch.bfloat16, fp8=policy.fp8, topology=layout()
    )


@pytest.mark.parametrize("value", ["off", "null"])
def test_off_changes_nothing(value):
    config = megatron_config(f"policy.fp8={value}")
    assert not config.fp8
    assert fingerprint(load(f"policy.fp8={value}")) == fingerprint(load())
    # As the identity of checkpoints that were written before there was a choice.
    assert decisive(load())["policy.fp8"] is None


@pytest.mark.parametrize(
    ("value", "fields"),
    [("hybrid", ("hybrid", "tensorwise")), ("blockwise", ("e4m3", "blockwise"))],
)
def test_megatron_is_told(value, fields):
    config = megatron_config(f"policy.fp8={value}")
    assert (config.fp8, config.fp8_recipe) == fields
    assert not config.fp8_param and not config.fp8_dot_product_attention
    assert fingerprint(load(f"policy.fp8={value}")) != fingerprint(load())


def test_the_layers_four_matrices_are_the_engines():
    spec = block_spec("te", megatron_config("policy.fp8=hybrid"), 1).layer_specs[0].submodules
    attention, mlp = spec.self_attention.submodules, spec.mlp.submodules
    assert attention.linear_qkv is mlp.linear_fc1 is engine.TEColumnParallelLinear
    assert attention.linear_proj is mlp.linear_fc2 is engine.TERowParallelLinear


# Megatron's own get_fp8_recipe beside a stand-in for the package: which of TE's recipes it makes.
ASK_MEGATRON = """
import importlib.abc, importlib.util, json, sys, types
from unittest.mock import MagicMock
from packaging.version import Version

class StandIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == "transformer_engine":
            return importlib.util.spec_from_loader(name, self, is_package=True)
    def create_module(self, spec):
        return MagicMock(__version__="2.5", __path__=[])
    def exec_module(self, module):
        pass

sys.meta_path.insert(0, StandIn())
from megatron.core import fp8_utils, utils
from reinforcer_tp.fp8 import RECIPES

def ask(settings, version):
    utils._te_version = Version(version)
    recipes = fp8_utils.transformer_engine.common.recipe = MagicMock()
    fp8_utils.get_fp8_recipe(types.SimpleNamespace(fp8_dot_product_attention=False, **settings))
    [(name, _, given)] = recipes.mock_calls
    formats = {id(recipes.Format.E4M3): "E4M3", id(recipes.Format.HYBRID): "HYBRID"}
    return [name, formats[id(given["fp8_format"])]]

assert fp8_utils.HAVE_TE
found = {name: ask(recipe.settings, recipe.engine) for name, recipe in RECIPES.items()}
for name, version in (("hybrid", "2.1.9"), ("blockwise", "2.2.9")):
    try:
        found[name].append(ask(RECIPES[name].settings, version))
    except ValueError:
        found[name].append("refused")
print(json.dumps(found))
"""


def test_megatron_makes_these_recipes_from_the_version_that_we_ask_for():
    run = subprocess.run([sys.executable, "-c", ASK_MEGATRON], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.splitlines()[-1]) == {
        "hybrid": ["Float8CurrentScaling", "HYBRID", "refused"],
        "blockwise": ["Float8BlockScaling", "E4M3", "refused"],
    }


PAIRS = st.lists(st.tuples(*[st.integers(1, 40)] * 3), min_size=8, max_size=24)


@settings(deadline=None, max_examples=60)
@given(
    sizes=PAIRS, fp8=st.sampled_from(["hybrid", "blockwise"]), tp=st.sampled_from([1, 2, 8]),
    sequence_parallel=st.booleans(), pp=st.sampled_from([1, 2]), dp=st.sampled_from([1, 3]),
)  # fmt: skip
@example(sizes=[(1, 1, 1)] * 8, fp8="hybrid", tp=8, sequence_parallel=True, pp=2, dp=3)
def test_every_rank_multiplies_whole_rows(sizes, fp8, tp, sequence_parallel, pp, dp):
    """16 rows, or whole blocks of 128: of the part of the row that a rank holds."""
    is_split = sequence_parallel and tp > 1
    config = load(f"policy.fp8={fp8}", "policy.micro_batch_tokens=256",
                  f"{MEGATRON}.sequence_parallel={str(is_split).lower()}")  # fmt: skip
    pairs = TokenizedSet.from_pairs(
        TokenizedPair(prompt=[1] * p, chosen=[2] * c, rejected=[3] * r, row=i)
        for i, (p, c, r) in enumerate(sizes)
    )
    rows = range(len(pairs))
    seen = []
    for dp_rank in range(dp):
        topology = layout(tp, pp, dp, dp_rank=dp_rank)
        for batch in micro_batches(pairs, rows, micro_batching(config, SHAPE, topology)).batches:
            own = len(batch.tokens) // (tp if is_split else 1)
            assert own % {"hybrid": 16, "blockwise": 128}[fp8] == 0 and own > 0
            seen += batch.rows
    assert sorted(seen) == list(rows)
    unpadded = micro_batching(load(), SHAPE, layout(tp, pp, dp))
    assert unpadded.divisible_by == 1


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("policy.precision=float32",), ("policy.precision=bfloat16", "got float32")),
        (("policy.precision=float16",), ("policy.precision=bfloat16", "got float16")),
        (("policy.layer_spec=local",), ("policy.layer_spec=local", "policy.layer_spec=auto")),
    ],
)
def test_other_keys_that_do_not_go_with_it_are_refused_by_check(overrides, says):
    overrides = ("data.dataset_name=embedded", *overrides)
    load(*overrides).validate(1)
    with pytest.raises(ConfigError) as error:
        load("policy.fp8=hybrid", *overrides).validate(1)
    for part in (*says, "policy.fp8=off"):
        assert part in str(error.value)


def test_a_matrix_that_fp8_cannot_multiply_is_refused_by_check():
    shape = {
        "model_type": "llama", "hidden_size": 96, "intermediate_size": 192, "vocab_size": 67,
        "num_attention_heads": 6, "num_key_value_heads": 2, "num_hidden_layers": 2,
        "max_position_embeddings": 4096,
    }  # fmt: skip
    validate_model(load("policy.fp8=blockwise"), shape)
    validate_model(load("policy.fp8=blockwise", f"{MEGATRON}.tensor_model_parallel_size=2"), shape)
    for change, says in (
        ({"intermediate_size": 200}, "intermediate_size=200 is 200 on each of 1"),
        ({"hidden_size": 88, "head_dim": 16}, "hidden_size=88"),
        ({"head_dim": 4}, "head_dim=40 is 40"),
    ):
        validate_model(load(), shape | change)
        with pytest.raises(ConfigError, match=says):
            validate_model(load("policy.fp8=hybrid"), shape | change)


def test_a_login_node_without_a_gpu_can_check_it(capsys):
    config = load_config(str(CONFIGS / "dpo_llama70b.yaml"), ["policy.fp8=blockwise"])
    assert check(config) == 0
    assert "fp8: blockwise" in capsys.readouterr().out


class Manager:
    """FP8GlobalStateManager, as of a GPU that has FP8 but no block scaling."""

    @staticmethod
    def is_fp8_available():
        return True, ""

    @staticmethod
    def is_fp8_block_scaling_available():
        return False, "CUDA >= 12.9 required."


@pytest.fixture
def installed(monkeypatch):
    def install(version):
        monkeypatch.setattr(engine, "HAVE_TE", True)
        monkeypatch.setattr(engine, "FP8GlobalStateManager", Manager, raising=False)
        monkeypatch.setattr("megatron.core.utils._te_version", Version(version))

    return install


def refusal(fp8, device):
    with pytest.raises(ConfigError) as error:
        check_fp8(fp8, device)
    return str(error.value)


def test_what_a_machine_lacks_is_said_when_a_run_starts(installed):
    for fp8 in ("off", None):
        check_fp8(fp8, torch.device("cpu"))
    assert "needs a CUDA device" in refusal("hybrid", torch.device("cpu"))
    if not engine.HAVE_TE:
        text = refusal("hybrid", CUDA)
        assert "transformer-engine >= 2.2, which cannot be imported" in text
        assert "pip install 'reinforcer-tp[gpu]'" in text
    installed("2.1.0")
    assert "needs transformer-engine >= 2.2, got 2.1.0" in refusal("hybrid", CUDA)
    installed("2.2.1")
    check_fp8("hybrid", CUDA)
    assert "needs transformer-engine >= 2.3, got 2.2.1" in refusal("blockwise", CUDA)
    installed("2.5.0")
    text = refusal("blockwise", CUDA)
    assert "policy.fp8=blockwise" in text and "CUDA >= 12.9 required. Use policy.fp8=hybrid" in text
