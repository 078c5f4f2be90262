"""The short form of the fault suite: every goal, a small share of its counts."""

import shutil
from pathlib import Path

import pytest

from tests.faults.__main__ import GOALS, fast_folder, run_goal

# A share of 0.1 would be a tenth of the full counts and take minutes for these: they start runs.
BUDGET = {"G1": 0.01, "G4": 0.02, "G5": 0.05, "G7": 0.03, "G8": 0.025}


@pytest.fixture
def folder(tmp_path):
    """In memory where there is some; its path has to be short and new."""
    fast = fast_folder()
    if fast is None:
        yield tmp_path
        return
    path = Path(fast) / f"{tmp_path.parent.parent.name}_{tmp_path.name}"
    path.mkdir()
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.mark.parametrize("goal", GOALS)
def test_goal_holds(goal, folder):
    figures, _ = run_goal(goal, BUDGET.get(goal, 0.1), seed=0, root=folder)
    print(figures.describe())
    assert figures.ok, figures.describe()
    assert any(figures.counts.values()), "nothing was tried"
