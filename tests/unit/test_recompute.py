"""Which layers and modules are recomputed: what Megatron is told, and what is refused.

That every way gives the same gradients is tested in tests/distributed/test_layouts.py.
"""

import pytest
import torch

from reinforcer_tp.config import ConfigError, fingerprint, load_config, validate_model
from reinforcer_tp.mcore.model import transformer_config
from tests.unit.test_fp8 import SHAPE, layout
from tests.unit.test_model_shape import SHAPE as FIVE_LAYERS

MEGATRON = "policy.megatron_cfg"
ON = "activation_checkpointing=true"
SELECTIVE = "recompute_granularity=selective"


def load(*keys):
    overrides = ["policy.model_name=m", "policy.max_total_sequence_length=128"]
    return load_config(None, overrides + [f"{MEGATRON}.{key}" for key in keys])


@pytest.mark.parametrize(
    ("keys", "told"),  # granularity, method, layers, modules
    [
        ((), (None, None, None, ["core_attn"])),
        (("recompute_method=block", "recompute_num_layers=3"), (None, None, None, ["core_attn"])),
        ((ON,), ("full", "uniform", 1, ["core_attn"])),
        ((ON, "recompute_num_layers=4"), ("full", "uniform", 4, ["core_attn"])),
        (
            (ON, "recompute_method=block", "recompute_num_layers=3"),
            ("full", "block", 3, ["core_attn"]),
        ),
        ((ON, SELECTIVE), ("selective", None, None, ["core_attn"])),
        (
            (ON, SELECTIVE, "recompute_modules=[mlp,core_attn]"),
            ("selective", None, None, ["mlp", "core_attn"]),
        ),
    ],
)
def test_megatron_is_told(keys, told):
    config = load(*keys)
    found = transformer_config(
        SHAPE, config.policy.megatron_cfg, dtype=torch.float32, topology=layout()
    )
    names = ["granularity", "method", "num_layers", "modules"]
    assert tuple(getattr(found, f"recompute_{name}") for name in names) == told
    assert fingerprint(config) == fingerprint(load())


@pytest.mark.parametrize("key", ["recompute_method=block", "recompute_num_layers=2"])
def test_counting_layers_makes_no_sense_for_modules(key):
    with pytest.raises(ConfigError, match="recompute_granularity=full"):
        load(ON, SELECTIVE, key)


def test_a_unit_of_layers_divides_every_stage():
    """Five layers, of which the first stage takes three."""
    stages = ("pipeline_model_parallel_size=2", "num_layers_in_first_pipeline_stage=3")
    validate_model(load(ON, "recompute_num_layers=5"), FIVE_LAYERS)
    validate_model(load(*stages, "recompute_num_layers=2"), FIVE_LAYERS)  # nothing is recomputed
    validate_model(
        load(ON, *stages, "recompute_method=block", "recompute_num_layers=2"), FIVE_LAYERS
    )
    with pytest.raises(ConfigError, match=r"=2 does not divide the 3 layers .* hold 3, 2"):
        validate_model(load(ON, *stages, "recompute_num_layers=2"), FIVE_LAYERS)
