"""How many layers each pipeline stage holds: the meaning of `policy.megatron_cfg`'s pipeline keys.

A stage here is one model chunk: with `virtual_pipeline_model_parallel_size` a rank holds several.
Stages are listed in the order in which a token passes them: the first chunk of every rank, then
the second of every rank, and so on. Imports neither torch nor transformers.
"""

import re

from reinforcer_tp.config_check import require, shown

_PREFIX = "policy.megatron_cfg"
_LAYOUT = f"{_PREFIX}.pipeline_model_parallel_layout"
_MAX_TEXT, _MAX_REPEATS = 2000, 999  # no model has more; keeps an expanded text small


def virtual_stages(megatron) -> int:
    """Model chunks on each pipeline rank. `megatron` is the config section, checked before."""
    if megatron.pipeline_model_parallel_layout is None:
        return megatron.virtual_pipeline_model_parallel_size or 1
    stages = split_layout(megatron.pipeline_model_parallel_layout)
    return len(stages) // megatron.pipeline_model_parallel_size


def check_pipeline(megatron) -> None:
    """Raises ConfigError where pipeline keys contradict each other, whatever the model."""
    pp = megatron.pipeline_model_parallel_size
    layout, virtual = (
        megatron.pipeline_model_parallel_layout,
        megatron.virtual_pipeline_model_parallel_size,
    )
    ends = ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage")
    needing = [name for name in ends if getattr(megatron, name) is not None]
    needing += ["virtual_pipeline_model_parallel_size"] if (virtual or 1) > 1 else []
    needing += [] if layout is None else ["pipeline_model_parallel_layout"]
    for name in needing:
        require(
            pp > 1,
            f"{_PREFIX}.{name}={shown(getattr(megatron, name))} needs "
            f"{_PREFIX}.pipeline_model_parallel_size > 1, got 1; set {_PREFIX}.{name}=null",
        )
    for name in ends:
        require(
            layout is None or getattr(megatron, name) is None,
            f"{_LAYOUT}={shown(layout)} already says how many layers every stage holds, but "
            f"{_PREFIX}.{name}={getattr(megatron, name)} is set too; set one of them to null",
        )
    if layout is not None:
        _check_stage_count(layout, pp, virtual)


def _check_stage_count(layout: str, pp: int, virtual: int | None) -> None:
    count = len(split_layout(layout))
    require(
        count % pp == 0,
        f"{_LAYOUT}={shown(layout)} has {count} stages, which is no multiple of "
        f"{_PREFIX}.pipeline_model_parallel_size={pp}; write {pp} stages, or {2 * pp} for two "
        f"chunks on every rank",
    )
    require(
        virtual is None or virtual * pp == count,
        f"{_LAYOUT}={shown(layout)} has {count} stages, but {_PREFIX}."
        f"virtual_pipeline_model_parallel_size={virtual} x pipeline_model_parallel_size={pp} is "
        f"{(virtual or 1) * pp}; set virtual_pipeline_model_parallel_size=null (the layout says "
        f"it) or write {(virtual or 1) * pp} stages",
    )


def split_layout(text: str) -> list[str]:
    """Megatron's layout text, e.g. `Et|(tt|)*2,tL` -> ["Et", "tt", "tt", "tL"].

    E is the embedding, t a layer, L the loss; `x*n` and `(...)*n` repeat, commas are decoration.
    Raises ConfigError for anything else, and where E is not first or L not last.
    """
    what = f"{_LAYOUT}={shown(text)}"
    expected = "expected stages such as Et|tt|t|tL: E the embedding, t a layer, L the loss"
    stray = re.search(r"[^EtL|,()*0-9]", text)
    require(stray is None, f"{what} has the character {stray and stray[0]!r}; {expected}")
    repeats = [int(digits) for digits in re.findall(r"[0-9]+", text[:_MAX_TEXT])]
    require(
        len(text) <= _MAX_TEXT and max(repeats, default=1) <= _MAX_REPEATS,
        f"{what} is longer than {_MAX_TEXT} characters or repeats more than {_MAX_REPEATS} times; "
        f"{expected}",
    )
    letters = text.replace(",", "")
    for pattern in (r"\(([^()]+)\)\*(\d+)", r"([EtL|])\*(\d+)"):  # first groups, then letters
        letters = re.sub(pattern, lambda found: found[1] * int(found[2]), letters)
    require(
        re.fullmatch(r"[EtL|]*", letters) is not None,
        f"{what} cannot be read; repeats are written t*3 or (tt|)*3, not nested; {expected}",
    )
    for letter, name, place, is_placed in (
        ("E", "the embedding", "beginning", letters.startswith("E")),
        ("L", "the loss", "end", letters.endswith("L")),
    ):
        require(
            letters.count(letter) == 1 and is_placed,
            f"{what} must have {letter} ({name}) once, at the {place}, got {letters.count(letter)}"
            f"{'' if is_placed else f', not at the {place}'}; {expected}",
        )
    stages = letters.split("|")
    require(all(stages), f"{what} has a stage with nothing in it; {expected}")
    return stages


def stage_layers(megatron, num_layers: int) -> list[int]:
    """Layers of each of the pp x vpp stages (Megatron-core's rule).

    Without a layout the first and last rank take their own keys where set and the rest is split
    evenly over the other ranks; a rank's layers are split evenly over its chunks. Raises
    ConfigError where that leaves a remainder or an empty stage.
    """
    pp, vpp = megatron.pipeline_model_parallel_size, virtual_stages(megatron)
    if megatron.pipeline_model_parallel_layout is not None:
        return _layout_layers(megatron.pipeline_model_parallel_layout, num_layers, pp * vpp)
    of_rank = _rank_layers(megatron, num_layers)
    uneven = [layers for layers in of_rank if layers % vpp]
    require(
        not uneven,
        f"{_PREFIX}.{_given(megatron)}: {(uneven or [0])[0]} of the model's {num_layers} layers "
        f"on one rank do not divide into {vpp} chunks; {_virtual_fix(num_layers, pp, vpp)}",
    )
    return [layers // vpp for _ in range(vpp) for layers in of_rank]


def _layout_layers(layout: str, num_layers: int, count: int) -> list[int]:
    layers = [stage.count("t") for stage in split_layout(layout)]
    require(
        sum(layers) == num_layers,
        f"{_LAYOUT}={shown(layout)} has {sum(layers)} layers (t), but the model has {num_layers}; "
        f"{_example(num_layers, count)}",
    )
    return layers


def _example(num_layers: int, count: int) -> str:
    if count > num_layers:
        return f"use at most {num_layers} stages"
    return f"for example {even_layout(num_layers, count)}"


def _rank_layers(megatron, num_layers: int) -> list[int]:
    pp = megatron.pipeline_model_parallel_size
    first = megatron.num_layers_in_first_pipeline_stage
    last = megatron.num_layers_in_last_pipeline_stage
    ends = [size for size in (first, last) if size is not None]
    rest, ranks = num_layers - sum(ends), pp - len(ends)
    fits = rest == 0 if ranks == 0 else rest >= ranks and rest % ranks == 0
    require(
        fits,
        f"{_PREFIX}.{_given(megatron)}: {_mismatch(num_layers, ends, rest, ranks)}; "
        f"{_rank_fix(megatron, num_layers)}",
    )
    each = [rest // ranks] * ranks if ranks else []
    return [*([] if first is None else [first]), *each, *([] if last is None else [last])]


def _mismatch(num_layers: int, ends: list[int], rest: int, ranks: int) -> str:
    if not ends:
        return f"the model's {num_layers} layers do not divide over {ranks} stages"
    if ranks == 0:
        return f"the two stages hold {sum(ends)} layers, but the model has {num_layers}"
    return f"the model's {num_layers} layers leave {rest} for {ranks} other stages"


def _given(megatron) -> str:
    keys = (
        "pipeline_model_parallel_size",
        "virtual_pipeline_model_parallel_size",
        "num_layers_in_first_pipeline_stage",
        "num_layers_in_last_pipeline_stage",
    )
    values = [(key, getattr(megatron, key)) for key in keys]
    return ", ".join(f"{key}={value}" for key, value in values if value is not None)


def _rank_fix(megatron, num_layers: int) -> str:
    pp, vpp = megatron.pipeline_model_parallel_size, virtual_stages(megatron)
    if pp > num_layers:
        return f"use at most {num_layers} stages"
    if vpp > 1:
        return _virtual_fix(num_layers, pp, vpp)
    if num_layers % pp == 0:
        return f"set both to null for {num_layers // pp} layers on every stage"
    even = num_layers // pp
    first = num_layers - even * (pp - 1)
    return (
        f"use num_layers_in_first_pipeline_stage={first} alone ({first}, then {even} on each of "
        f"{pp - 1}), pipeline_model_parallel_layout='{even_layout(num_layers, pp)}', or a "
        f"pipeline size that divides {num_layers}"
    )


def _virtual_fix(num_layers: int, pp: int, vpp: int) -> str:
    if pp * vpp > num_layers:
        return f"use at most {num_layers // pp} chunks on each of {pp} ranks"
    if num_layers % (pp * vpp) == 0:
        return (
            "set num_layers_in_first_pipeline_stage and num_layers_in_last_pipeline_stage to null"
        )
    return (
        f"use pipeline_model_parallel_layout='{even_layout(num_layers, pp * vpp)}' with "
        f"virtual_pipeline_model_parallel_size=null, or sizes whose product divides {num_layers}"
    )


def even_layout(num_layers: int, count: int) -> str:
    """The layout text of `count` stages, as even as can be and lighter at both ends."""
    layers = [num_layers // count] * count
    for extra in range(num_layers % count):
        layers[(1 + extra) % count] += 1
    return "E" + "|".join("t" * number for number in layers) + "L"
