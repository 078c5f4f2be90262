"""Layers of every pipeline stage: Megatron-core's own answers, and refusals before it is asked."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reinforcer_tp.config import ConfigError, MegatronConfig
from reinforcer_tp.pipeline_layout import (
    check_pipeline,
    even_layout,
    split_layout,
    stage_layers,
)

LAYOUT = "policy.megatron_cfg.pipeline_model_parallel_layout"


def megatron(pp: int, **keys) -> MegatronConfig:
    names = {
        "virtual": "virtual_pipeline_model_parallel_size",
        "first": "num_layers_in_first_pipeline_stage",
        "last": "num_layers_in_last_pipeline_stage",
        "layout": "pipeline_model_parallel_layout",
    }
    given = {names[key]: value for key, value in keys.items()}
    return MegatronConfig(pipeline_model_parallel_size=pp, **given)


def refusal(pp: int, num_layers: int = 5, **keys) -> str:
    section = megatron(pp, **keys)
    with pytest.raises(ConfigError) as caught:
        check_pipeline(section)
        stage_layers(section, num_layers)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def megatron_core_stages(num_layers: int, pp: int, virtual, first, last) -> list | None:
    """Megatron-core's own answer, in the order of the layers, or None where it refuses."""
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    try:
        config = TransformerConfig(
            num_layers=num_layers,
            hidden_size=8,
            num_attention_heads=2,
            pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=virtual,
            pipeline_dtype="float32",
            num_layers_in_first_pipeline_stage=first,
            num_layers_in_last_pipeline_stage=last,
        )
        vp_stages = [None] if virtual is None else range(virtual)
        places = list(itertools.product(vp_stages, range(pp)))
        stages = [get_num_layers_to_build(config, *place) for place in places]
        offsets = [get_transformer_layer_offset(config, *place) for place in places]
    except (AssertionError, ValueError, ZeroDivisionError):
        return None
    if sum(stages) != num_layers or min(stages) <= 0:
        return None
    assert offsets == [sum(stages[:i]) for i in range(len(stages))]
    return stages


def test_layers_are_split_as_megatron_splits_them():
    compared = 0
    ends = (None, 1, 2, 4)
    for num_layers, pp, virtual in itertools.product((4, 5, 8, 12), (2, 3, 4), (None, 2, 3)):
        for first, last in itertools.product(ends, ends):
            section = megatron(pp, virtual=virtual, first=first, last=last)
            expected = megatron_core_stages(num_layers, pp, virtual, first, last)
            if expected is not None:
                compared += 1
                assert stage_layers(section, num_layers) == expected
            # With two ranks, both keys and chunks Megatron-core divides by zero: only we can.
            elif not (pp == 2 and virtual and first and last and first + last == num_layers):
                with pytest.raises(ConfigError):
                    stage_layers(section, num_layers)
    assert compared > 50


def test_both_ends_of_two_interleaved_ranks():
    section = megatron(2, virtual=2, first=6, last=2)
    assert stage_layers(section, 8) == [3, 1, 3, 1]


_LETTERS = st.text("t", max_size=4)
_GROUPS = st.builds("({}|{}){}".format, _LETTERS, _LETTERS, st.sampled_from(["*2", "*11", "*1"]))
_PARTS = st.one_of(_LETTERS, _GROUPS, st.sampled_from(["t*3", "|", ",", "t*12"]))


@given(parts=st.lists(_PARTS, max_size=6))
def test_layouts_read_as_megatron_reads_them(parts):
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    text = "E" + "".join(parts) + "L"
    letters = {LayerType.embedding: "E", LayerType.decoder: "t", LayerType.loss: "L"}
    parsed = PipelineParallelLayerLayout.parse_str_to_list(text)
    expected = ["".join(letters[layer] for layer in stage) for stage in parsed]
    if all(expected):
        assert split_layout(text) == expected
    else:
        with pytest.raises(ConfigError, match="nothing in it"):
            split_layout(text)


@given(num_layers=st.integers(1, 90), count=st.integers(2, 32))
def test_the_layouts_that_errors_propose_can_be_used(num_layers, count):
    if num_layers < count:
        return
    layers = [stage.count("t") for stage in split_layout(even_layout(num_layers, count))]
    assert sum(layers) == num_layers and len(layers) == count
    assert max(layers) - min(layers) <= 1


BAD_TEXTS = {
    "Et|txL": "character 'x'",
    "Et|tmL": "character 'm'",
    "__import__('os')": "character '_'",
    "Et|t L": "character ' '",
    "t|tL": "E (the embedding) once, at the beginning, got 0",
    "tE|tL": "E (the embedding) once, at the beginning, got 1, not at the beginning",
    "Et|Et|tL": "got 2",
    "Et|t": "L (the loss) once, at the end, got 0",
    "Et|tLt": "not at the end",
    "Et|tL*2": "got 2",
    "Et||tL": "nothing in it",
    "Et|tL|": "not at the end",
    "Et|(t|(t)*2|)*2tL": "cannot be read",
    "Et|t*tL": "cannot be read",
    "Et|(t|tL": "cannot be read",
    "Et|t3L": "cannot be read",
    "Et*99999999999|tL": "repeats more than 999",
    "E" + "t" * 3000 + "|tL": "longer than 2000",
}


@pytest.mark.parametrize("text", BAD_TEXTS)
def test_a_layout_that_cannot_be_read(text):
    with pytest.raises(ConfigError) as caught:
        split_layout(text)
    message = str(caught.value)
    assert message.startswith(f"{LAYOUT}=")
    assert BAD_TEXTS[text] in message and "Et|tt|t|tL" in message and "\n" not in message
    assert len(message) < 400


REFUSED = [
    ((2, {"layout": "Et|tt|ttL"}), ("3 stages", "=2", "write 2 stages, or 4")),
    ((2, {"layout": "Et|tttt,L", "first": 1}), ("num_layers_in_first", "set one of them to null")),
    ((2, {"layout": "Et|tttt,L", "last": 1}), ("num_layers_in_last", "set one of them to null")),
    ((2, {"layout": "Et|ttttL", "virtual": 2}), ("has 2 stages", "=2 x", "is 4", "write 4")),
    ((2, {"layout": "Et|tt|t|tttL"}), ("has 7 layers", "the model has 5", "Et|tt|t|tL")),
    ((2, {"virtual": 2}), ("5 layers", "layout='Et|tt|t|tL'", "divides 5")),
    ((2, {"virtual": 2, "first": 3}), ("3 of the model's 5", "2 chunks", "layout='Et|tt|t|tL'")),
    ((2, {"virtual": 4}), ("5 layers", "at most 2 chunks on each of 2 ranks")),
    ((2, {}), ("first_pipeline_stage=3", "layout='Ett|tttL'", "divides 5")),
]


@pytest.mark.parametrize(("case", "parts"), REFUSED)
def test_contradictions_are_refused_with_their_cure(case, parts):
    pp, keys = case
    message = refusal(pp, **keys)
    for part in parts:
        assert part in message
