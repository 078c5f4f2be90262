"""G4: whatever comes in, a clear line or the right masks, and every row accounted for."""

import math
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import datasets

from tests.faults.bad_configs import check_configs, check_exit_codes
from tests.faults.bad_files import check_files
from tests.faults.changed_files import check_changes
from tests.faults.figures import Figures
from tests.faults.generated_rows import check_mistakes, check_rows
from tests.faults.template_pairs import check_templates

TITLE = "hostile rows, files, configurations and templates: a clear line, or the right masks"


def run(budget: float, seed: int, folder: Path) -> Figures:
    """`budget` 1.0: 5,000 rows, all files, 500 configurations, all pairs of tokenizer, template."""
    every = max(1, round(1 / budget))
    counts, failures = Counter(), []
    folder.mkdir(parents=True, exist_ok=True)
    with patch.object(datasets.config, "HF_DATASETS_CACHE", folder / "hf_cache"):
        parts = (
            lambda: check_rows(math.ceil(5000 * budget), seed * 1_000_000, folder),
            lambda: check_mistakes(max(1, round(5 * budget)), seed, folder),
            lambda: check_files(folder, min(every, 3)),
            lambda: check_changes(folder),
            lambda: check_templates(folder, min(every, 4)),
            lambda: check_configs(math.ceil(500 * budget), seed, folder),
            lambda: check_exit_codes(min(every, 5), folder),
        )
        for part in parts:
            found, wrong = part()
            counts.update(found)
            failures += wrong
    return Figures("G4", TITLE, dict(counts), failures)
