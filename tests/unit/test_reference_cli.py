"""python -m reinforcer_tp.reference: what it says, what it refuses, what it removes."""

import os
import time
from pathlib import Path

import pytest

from reinforcer_tp.reference.__main__ import main
from reinforcer_tp.reference.store import ReferenceKey, ReferenceStore
from tests.unit.reference_pairs import KEY, fill, lines_of, one_error, pair, true_logps

OTHER = ReferenceKey("77" * 32, "bfloat16-v1")


def names(folder: Path, key: ReferenceKey = KEY) -> set[str]:
    return {path.name for path in (folder / key.name).iterdir()}


def damage(folder: Path) -> Path:
    path = sorted((folder / KEY.name).glob("*.parquet"))[-1]
    path.write_bytes(path.read_bytes()[:-1])
    return path


def cells(text: str) -> dict[str, str]:
    """The rows of the printed table: name -> value, columns parted by two spaces."""
    rows = [line.strip().split("  ", 1) for line in text.splitlines() if "  " in line.strip()]
    return {name: value.strip() for name, value in rows}


def test_inspect_counts_what_is_there(tmp_path, capsys):
    fill(tmp_path, range(5))
    fill(tmp_path, range(3, 7))
    assert main(["inspect", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    found = cells(output)
    num_tokens = sum(len(pair(row).chosen) + len(pair(row).rejected) for row in range(7))
    expected = {
        "model": "/models/m",
        "numerics": "float32-v1",
        "shards": "2",
        "pairs": "7",
        "duplicate pairs": "2",
        "response tokens": str(num_tokens),
        "damaged shards": "0",
    }
    assert KEY.name in output and expected.items() <= found.items()
    assert found["first written"].startswith(time.strftime("%Y-", time.gmtime()))
    assert found["first written"] <= found["last written"]


def test_inspect_shows_every_reference_and_what_is_damaged(tmp_path, capsys):
    fill(tmp_path, range(5))
    fill(tmp_path, range(5, 9))
    ReferenceStore(tmp_path, OTHER, model="/models/other")
    path = damage(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 65
    output = capsys.readouterr().out
    assert OTHER.name in output and "/models/other" in output
    assert f"damaged: {path}: its bytes are not those that were written" in output
    assert path.exists()


def test_inspect_names_a_bad_reference_json(tmp_path, capsys):
    fill(tmp_path, range(2))
    ReferenceStore(tmp_path, OTHER, model="/models/other")
    (tmp_path / KEY.name / "reference.json").unlink()
    assert main(["inspect", str(tmp_path)]) == 65
    output = capsys.readouterr().out
    assert "reference.json is missing" in output and "/models/other" in output


@pytest.mark.parametrize("command", ["inspect", "verify", "prune"])
def test_what_is_no_store_is_refused(tmp_path, capsys, command):
    assert main([command, str(tmp_path / "absent")]) == 78
    assert "is no folder" in one_error(capsys)
    (tmp_path / "precious.parquet").write_text("")
    assert main([command, str(tmp_path)]) == 78
    assert "is no reference store" in one_error(capsys)
    fill(tmp_path, [0])
    assert main([command, str(tmp_path / KEY.name)]) == 78
    assert f"one reference of the store {tmp_path}" in one_error(capsys)


def leftover(folder: Path, age_s: float) -> str:
    name = f".tmp-host-1-{int(age_s):016x}"
    path = folder / KEY.name / name
    path.write_bytes(b"half")
    os.utime(path, (time.time() - age_s, time.time() - age_s))
    return name


def test_prune_removes_leftovers_and_damage_only(tmp_path, capsys):
    fill(tmp_path, range(2))
    good = names(tmp_path)
    fill(tmp_path, range(2, 4))
    path = damage(tmp_path)
    old, new = leftover(tmp_path, 3700), leftover(tmp_path, 3500)
    foreign = tmp_path / KEY.name / "notes.parquet"
    foreign.write_text("mine")
    assert main(["prune", str(tmp_path), "--dry-run"]) == 0
    lines = lines_of(capsys)
    assert [line.split(": ")[0] for line in lines[:-1]] == [
        str(tmp_path / KEY.name / old),
        str(path),
    ]
    assert lines[-1].startswith("to remove: 2 files")
    assert names(tmp_path) == good | {old, new, path.name, foreign.name}
    assert main(["prune", str(tmp_path), "--yes"]) == 0
    assert names(tmp_path) == good | {new, foreign.name}
    assert main(["prune", str(tmp_path), "--yes"]) == 0
    assert lines_of(capsys)[-1] == "to remove: 0 files, 0.0 MiB"


def test_prune_removes_old_shards_where_asked(tmp_path):
    fill(tmp_path, range(2))
    [old] = (tmp_path / KEY.name).glob("*.parquet")
    moment = time.time() - 10 * 86400
    os.utime(old, (moment, moment))
    fill(tmp_path, range(2, 4))
    ReferenceStore(tmp_path, OTHER, model="/models/other")
    kept = names(tmp_path) - {old.name}
    for days, expected in (("11", kept | {old.name}), ("9.5", kept)):
        assert main(["prune", str(tmp_path), "--older-than", days, "--yes"]) == 0
        assert names(tmp_path) == expected


def test_prune_counts_a_file_once(tmp_path, capsys):
    fill(tmp_path, [0])
    path = damage(tmp_path)
    os.utime(path, (1.0, 1.0))
    assert main(["prune", str(tmp_path), "--older-than", "1", "--dry-run"]) == 0
    first, last = lines_of(capsys)
    assert first.startswith(f"{path}: damaged") and last.startswith("to remove: 1 files")


def test_prune_of_one_reference_leaves_the_others(tmp_path):
    fill(tmp_path, range(2))
    leftover(tmp_path, 5)
    with ReferenceStore(tmp_path, OTHER, model="/models/other").writer() as writer:
        writer.add(pair(0), true_logps(pair(0)))
    before = names(tmp_path, OTHER)
    assert main(["prune", str(tmp_path), "--reference", KEY.digest[:8], "--yes"]) == 0
    assert not (tmp_path / KEY.name).exists()
    assert names(tmp_path, OTHER) == before
    (tmp_path / OTHER.name / "precious").write_text("mine")
    (tmp_path / OTHER.name / "reference.json").write_text("{")  # goes all the same
    assert main(["prune", str(tmp_path), "--reference", OTHER.name, "--yes"]) == 0
    assert names(tmp_path, OTHER) == {"precious"}


def test_prune_wants_to_know_which(tmp_path, capsys):
    fill(tmp_path, [0])
    fill_other = ReferenceKey(KEY.digest, "bfloat16-v1")
    ReferenceStore(tmp_path, fill_other, model="/models/m")
    assert main(["prune", str(tmp_path), "--reference", KEY.digest[:32], "--yes"]) == 78
    assert KEY.name in one_error(capsys)
    assert main(["prune", str(tmp_path), "--reference", "00", "--yes"]) == 78
    assert "begins with '00'" in one_error(capsys)
    assert len(names(tmp_path)) == 2


def test_prune_asks(tmp_path, capsys, monkeypatch):
    fill(tmp_path, [0])
    damage(tmp_path)
    before = names(tmp_path)
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    assert main(["prune", str(tmp_path)]) == 78
    assert "--yes" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    for answer, expected in (("", before), ("n", before), ("y", {"reference.json"})):
        monkeypatch.setattr("builtins.input", lambda prompt, answer=answer: answer)
        assert main(["prune", str(tmp_path)]) == 0
        assert names(tmp_path) == expected


def test_prune_keeps_what_it_cannot_read(tmp_path, capsys, monkeypatch):
    """An error of the file system says nothing about the shard."""
    fill(tmp_path, [0])
    before = names(tmp_path)

    def fail(path: Path) -> bytes:
        if path.suffix == ".parquet":
            raise OSError(5, "Input/output error")
        return read_bytes(path)

    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", fail)
    assert main(["inspect", str(tmp_path)]) == 65
    assert "cannot be read (Input/output error)" in capsys.readouterr().out
    assert main(["prune", str(tmp_path), "--yes"]) == 0
    assert names(tmp_path) == before


@pytest.mark.parametrize(
    "arguments",
    [["--older-than", "-1"], ["--older-than", "nan"], ["--older-than", "soon"], ["--pairs", "3"]],
)
def test_prune_refuses_nonsense(tmp_path, arguments):
    with pytest.raises(SystemExit) as error:
        main(["prune", str(tmp_path), *arguments])
    assert error.value.code == 2
