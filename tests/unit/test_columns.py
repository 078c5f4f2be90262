"""Columns beside the texts: margins, precomputed log-probs of the reference, ignored ones."""

import math

import datasets
import pytest

from reinforcer_tp.config import ConfigError, load_config, to_yaml
from reinforcer_tp.data import format_report
from tests.unit.test_prepare import (  # own_cache is a fixture of every test here
    jsonl,
    own_cache,  # noqa: F401
    prepare,
    reference,
    text_row,
)


def test_margins_and_reference_log_probs_reach_the_set(tmp_path):
    rows = [
        text_row(0, margin=1.5, **reference(-3.1, -2.2)),
        text_row(1, chosen="no", margin=9.0, **reference(-3.3, -2.4)),  # dropped
        text_row(2, **reference(-1e-9, -0.0)),
        text_row(3, margin=-0.5, **reference(-5, -6.6)),
    ]
    path = jsonl(tmp_path / "a.jsonl", rows)
    data = prepare(
        {"train_data_path": path, "val_data_path": jsonl(tmp_path / "b.jsonl", [text_row(0)])}
    )
    assert data.train.margins.tolist() == [1.5, 0.0, -0.5]
    assert data.train.has_reference and not data.validation.has_reference
    assert data.train.reference_sums.tolist() == [[-3.1, -2.2], [-1e-9, 0.0], [-5.0, -6.6]]
    report = data.report["train"]
    assert report["margins"] == {"rows": 2, "min": -0.5, "mean": 0.5, "max": 1.5}
    assert data.report["validation"]["margins"] is None
    text = format_report(data.report)
    assert "train: 2 rows have a margin, from -0.5 to 1.5, mean 0.5\n" in text
    assert text.count("reference log-probs come with the rows") == 1
    assert "train: reference log-probs come with the rows" in text


def test_columns_that_are_ignored_are_not_read(tmp_path):
    rows = [
        text_row(0, weight=-1, margin="big", extra=1, ref_chosen_logps=-1.0),
        text_row(1, weight=-1, margin="big", extra=1, ref_rejected_logps=-1.0),
    ]
    names = ["weight", "margin", "ref_chosen_logps", "ref_rejected_logps"]
    config = {
        "train_data_path": jsonl(tmp_path / "a.jsonl", rows),
        "val_data_path": jsonl(tmp_path / "b.jsonl", [text_row(2)]),  # has none of them
        "ignore_columns": names,
    }
    data = prepare(config)
    assert [(pair.weight, pair.margin, pair.reference) for pair in data.train] == [(1, 0, None)] * 2
    plain = jsonl(tmp_path / "c.jsonl", [text_row(0), text_row(1)])
    again = prepare(config | {"train_data_path": plain, "ignore_columns": []})
    assert again.fingerprint == data.fingerprint
    with pytest.raises(ValueError, match=r"keys with a value: .*; expected rejected too; name the"):
        prepare(config | {"ignore_columns": [*names, "rejected"]})
    with pytest.raises(
        ValueError, match=r"data\.ignore_columns has wieght, .*did you mean weight\?"
    ):
        prepare(config | {"ignore_columns": [*names, "wieght"]})
    with pytest.raises(ValueError, match=r"has zzz, .* among chosen, .*, weight; take it out of"):
        prepare(config | {"ignore_columns": ["extra", "zzz", *names]})


def test_ignored_columns_from_the_configuration(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "policy: {model_name: x}\ndata: {ignore_columns: [weight, margin]}\n"
    )
    from_file = load_config(str(tmp_path / "a.yaml"), [])
    override = load_config(None, ["policy.model_name=x", "data.ignore_columns=[weight,margin]"])
    assert override == from_file and from_file.data.ignore_columns == ["weight", "margin"]
    (tmp_path / "b.yaml").write_text(to_yaml(from_file))
    assert load_config(str(tmp_path / "b.yaml"), []) == from_file
    assert load_config(None, ["policy.model_name=x"]).data.ignore_columns == []
    with pytest.raises(ConfigError, match=r"data\.ignore_columns"):
        load_config(None, ["policy.model_name=x", "data.ignore_columns=weight"])


def test_reference_log_probs_of_some_rows_only_are_a_mistake(tmp_path):
    rows = [text_row(0, **reference(-1.0, -2.0)), text_row(1), text_row(2), text_row(3, tie=True)]
    path = jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(ValueError) as caught:
        prepare({"train_data_path": path})
    assert str(caught.value) == (
        f"data.train_data_path={path}: 1 of 3 usable rows have ref_chosen_logps and "
        "ref_rejected_logps; expected all or none; fill in the others, or leave both columns out "
        "with data.ignore_columns=[ref_chosen_logps,ref_rejected_logps]"
    )
    tie_only = [text_row(0, **reference(-1.0, -2.0)), text_row(1, tie=True)]  # dropped: none needed
    found = prepare({"train_data_path": jsonl(tmp_path / "b.jsonl", tie_only)})
    assert found.train.has_reference


def test_a_cut_row_with_reference_log_probs_is_a_mistake(tmp_path):
    rows = [text_row(0, **reference(-1, -2)), text_row(1, prompt="x" * 50, **reference(-1, -2))]
    config = {"train_data_path": jsonl(tmp_path / "a.jsonl", rows), "overlong": "truncate_prompt"}
    with pytest.raises(ValueError, match=r"row 1 .*overlong=truncate_prompt cuts the row"):
        prepare(config)
    names = ["ref_chosen_logps", "ref_rejected_logps"]
    assert prepare(config | {"ignore_columns": names}).report["train"]["truncated"] == 1


def test_parquet_columns_with_nan_are_mistakes(tmp_path):
    """JSON has no NaN; parquet has, and it is not null."""
    for name in ("margin", "weight", "ref_chosen_logps"):
        rows = [
            text_row(i, **reference(-1.0, -1.0)) | {"margin": 0.5, "weight": 1.0} for i in (0, 1)
        ]
        rows[1][name] = math.nan
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / f"{name}.parquet")
        with pytest.raises(ValueError, match=rf"row 1 \(counted from 0\): {name}=nan; expected a"):
            prepare({"train_data_path": str(tmp_path / f"{name}.parquet")})
