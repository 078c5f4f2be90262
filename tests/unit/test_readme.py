"""The README and the docs are true: their tables are those of the code."""

import importlib.util
import re

import pytest

from reinforcer_tp.config import Config
from reinforcer_tp.config_check import METRICS
from reinforcer_tp.config_keys import ALIASES, all_keys
from reinforcer_tp.health import SUMS as HEALTH_SUMS
from reinforcer_tp.health import health_metrics
from reinforcer_tp.lifecycle.exits import MEANING, Exit
from reinforcer_tp.preference_losses import LOSSES, WITH_MARGINS
from tests.unit.docs_pages import ROOT, page, prose, rows, section

_SPEC = importlib.util.spec_from_file_location("config_table", ROOT / "docs" / "config_table.py")
CONFIG_TABLE = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(CONFIG_TABLE)
DEFAULTS = {key: default for key, _, default, _ in CONFIG_TABLE.rows(Config)}


def test_the_tables_of_keys_are_up_to_date(capsys):
    assert CONFIG_TABLE.main(["--check"]) == 0, capsys.readouterr().out
    for cells in CONFIG_TABLE.rows(Config):
        assert all(cells), f"{cells[0]} has no comment in config.py"


def test_the_page_of_keys_has_each_once():
    listed = [row[0].strip("`") for row in rows(page("docs/configuration.md"))]
    assert sorted(listed) == sorted(DEFAULTS)


def test_a_stale_table_is_found(tmp_path, monkeypatch, capsys):
    stale = tmp_path / "configuration.md"
    stale.write_text(CONFIG_TABLE.PAGE.read_text().replace("dpo.seed", "dpo.sead"))
    monkeypatch.setattr(CONFIG_TABLE, "PAGE", stale)
    assert CONFIG_TABLE.main(["--check"]) == 1 and str(stale) in capsys.readouterr().out
    assert CONFIG_TABLE.main(["--write"]) == 0 and CONFIG_TABLE.main(["--check"]) == 0


def test_the_readme_can_be_read_in_ten_minutes():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 300
    assert len(prose("README.md").split()) <= 2200  # 220 words a minute, tables included


def test_the_table_of_losses_is_complete():
    listed = {row[0].strip("`"): row[2] for row in rows(section("docs/losses.md", "The menu"))}
    assert list(listed) == list(LOSSES)
    assert {name for name, options in listed.items() if "margin" in options} == set(WITH_MARGINS)


def test_the_table_of_exit_codes_is_complete():
    listed = rows(section("docs/running.md", "Exit codes"))
    assert listed == [[str(int(code)), code.name, MEANING[code]] for code in Exit]


def test_the_metrics_are_listed():
    listed = re.findall(r"`([\w/]+)`", section("docs/running.md", "Metrics"))
    assert set(METRICS) <= set(listed)
    text = section("docs/running.md", "Is it going well?")
    listed = re.findall(r"`((?:health|kl)/\w+|entropy)`", text)
    sums = dict.fromkeys(HEALTH_SUMS, 2.0) | {"health/margin": 0.5, "health/length": 0.5}
    assert set(listed) == set(health_metrics(sums))


def our_keys(text: str) -> list[str]:
    """What is written as a key of ours: `section.key`, maybe with =value."""
    sections = "|".join(name for name in all_keys(Config) if "." not in name)
    return re.findall(rf"`((?:{sections})\.[\w.]+)(?:=[^`]*)?`", text)


@pytest.mark.parametrize(
    "name", ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
)
def test_every_key_that_is_named_exists(name):
    """On the page about other trainers their own keys stand in the first column."""
    text = prose(name)
    if name == "docs/migration.md":
        text = re.sub(r"^\|[^|]*\|", "|", text, flags=re.M)
        assert len(our_keys(text)) > 120
    known = set(all_keys(Config))
    assert set(our_keys(text)) <= known


@pytest.mark.parametrize("other", ["From NeMo-RL", "From TRL"])
def test_our_defaults_beside_theirs_are_the_codes(other):
    table = rows(section("docs/migration.md", other).split("### Defaults that differ")[1])
    assert len(table) >= 8
    for _, theirs, key, ours in table:
        assert DEFAULTS[key.strip("`")] == ours
        assert theirs != ours


def test_names_of_trl_are_those_that_a_mistyped_key_is_told():
    compared = 0
    for theirs, ours, _ in rows(section("docs/migration.md", "Names")):
        alias = ALIASES.get(theirs.strip("`"))
        if alias is not None:
            assert f"`{alias}`" == ours, theirs
            compared += 1
    assert compared >= 10
