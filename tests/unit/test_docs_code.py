"""The code blocks of the docs do what their pages say."""

import json
import random
from types import SimpleNamespace

import pytest
import torch

from reinforcer_tp import preference_losses
from reinforcer_tp.data import dataset_classes
from reinforcer_tp.data.shapes import pair_from_row
from reinforcer_tp.preference_losses import LossOptions, Pairs
from tests.unit.docs_pages import PAGES, blocks, name_of


def run_block(name: str, mark: str, names: dict) -> dict:
    """The names after a page's python block with `mark` in it has run among `names`."""
    [source] = [text for text in blocks(name, "python") if mark in text]
    exec(compile(source, name, "exec"), names)  # our own file
    return names


@pytest.mark.parametrize("page", ["README.md", "docs/data.md"])
def test_rows_of_the_docs_are_recognised(page):
    lines = [line for text in blocks(page, "json") for line in text.splitlines()]
    assert lines
    for line in lines:
        pair = pair_from_row(json.loads(line))
        assert "2+2" in str(pair.prompt) and "4" in str(pair.chosen) and "5" in str(pair.rejected)


def test_the_dataset_class_of_a_users_own(tmp_path):
    names = run_block("docs/data.md", "class CustomDPODataset", {})
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "What is 2+2?", "good": "4", "bad": "5"}\n')
    made = names["CustomDPODataset"](str(path), str(path), "question", "good", "bad")
    assert made.task_spec.dataset_name == "custom_dpo"
    assert made.formatted_ds["train"][0] == {
        "prompt": "What is 2+2?",
        "chosen_response": "4",
        "rejected_response": "5",
    }


def test_the_dataset_class_of_the_package(tmp_path):
    names = run_block("docs/extending.md", "class ScoredDataset", dict(vars(dataset_classes)))
    rows = [
        {"instruction": "a", "answers": ["x", "y"], "scores": [2, 1]},
        {"instruction": "b", "answers": ["x", "y"], "scores": [1, 3]},
        {"instruction": "c", "answers": ["x", "y"], "scores": [1, 1]},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = names["ScoredDataset"](str(path))
    assert made.formatted_ds["validation"] is None
    pairs = [pair_from_row(row) for row in made.formatted_ds["train"]]
    found = [
        (p.prompt[0]["content"], p.chosen[0]["content"], p.rejected[0]["content"], p.tie)
        for p in pairs
    ]
    assert found == [("a", "x", "y", False), ("b", "y", "x", False), ("c", "x", "y", True)]


def test_the_loss_follows_its_formula():
    names = run_block("docs/extending.md", "def squared_hinge", dict(vars(preference_losses)))
    formulas = run_block("docs/extending.md", 'FORMULAS["squared_hinge"]', {"FORMULAS": {}})
    draw = random.Random(0)
    sides = [[draw.uniform(-9, 9) for _ in range(2)] for _ in range(50)]
    margins = [draw.random() for _ in sides]
    scores = torch.tensor(sides, dtype=torch.float64)
    pairs = Pairs(scores, scores, scores, torch.ones_like(scores), torch.tensor(margins).double())
    options = LossOptions(beta=0.3)
    losses = names["squared_hinge"](pairs, options).tolist()
    for (chosen, rejected), margin, loss in zip(sides, margins, losses, strict=True):
        terms = SimpleNamespace(x=0.3 * (chosen - rejected) - margin)
        expected = formulas["FORMULAS"]["squared_hinge"](terms, options)
        assert loss == pytest.approx(expected, rel=1e-6, abs=1e-6)  # margins are float32


def test_the_operators_example():
    names = {"hidden": torch.randn(6, 8), "weight": torch.randn(20, 8), "labels": torch.arange(6)}
    names |= {"tp_rank": 0, "tp_group": None, "vocab_size": 20}
    run_block("docs/concepts.md", "import vocab_parallel_linear_logprob", names)
    expected = (
        (names["hidden"] @ names["weight"].T).log_softmax(1).gather(1, names["labels"][:, None])
    )
    torch.testing.assert_close(names["logps"], expected[:, 0])


def test_no_block_of_code_is_left_out():
    found = [text for path in PAGES for text in blocks(name_of(path), "python")]
    assert len(found) == 5, "a new block needs a test here"
