"""Models and files that several integration tests share."""

import gzip
import os
import signal
from itertools import islice
from pathlib import Path

import pytest

from tests.integration.random_model import make_random_llama, make_rows, write_jsonl


@pytest.fixture(scope="session", autouse=True)
def terminated_tests_end_their_runs():
    """`timeout` and CI end pytest with SIGTERM: leave through the harness's `finally` then."""

    def leave(*_):
        pytest.exit("terminated", returncode=128 + signal.SIGTERM)

    previous = signal.signal(signal.SIGTERM, leave)
    yield
    signal.signal(signal.SIGTERM, previous)


@pytest.fixture(scope="session")
def assets() -> Path:
    """Folder with stories260k and rasbt_polite; tests that need it are skipped without it."""
    folder = os.environ.get("REINFORCER_TP_ASSETS")
    if not folder:
        pytest.skip("REINFORCER_TP_ASSETS is not set: no stories260k, no rasbt_polite")
    for part in ("stories260k", "datasets/rasbt_polite/all.pairs.jsonl.gz"):
        if not (Path(folder) / part).exists():
            pytest.skip(f"REINFORCER_TP_ASSETS={folder} has no {part}")
    return Path(folder)


@pytest.fixture(scope="session")
def polite_rows(assets, tmp_path_factory) -> str:
    """The first 44 pairs of rasbt_polite: five batches of eight, then a second epoch."""
    path = tmp_path_factory.mktemp("polite") / "polite.jsonl"
    source = assets / "datasets" / "rasbt_polite" / "all.pairs.jsonl.gz"
    with gzip.open(source, "rt", encoding="utf-8") as rows:
        path.write_text("".join(islice(rows, 44)), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def random_llama(tmp_path_factory) -> str:
    return make_random_llama(tmp_path_factory.mktemp("random_llama"))


@pytest.fixture(scope="session")
def random_rows(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("random_rows")
    weighted = make_rows(44)
    plain = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in weighted]
    return {
        "random": write_jsonl(folder / "plain.jsonl", plain),
        "random-weighted": write_jsonl(folder / "weighted.jsonl", weighted),
    }
