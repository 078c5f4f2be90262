"""G4, part two: files that are broken in every way known, each with what must come of it."""

import gzip
import io
import json
import os
import pickle
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from reinforcer_tp.data import prepare_data
from tests.faults.generated_rows import unclear
from tests.unit.toy_tokenizer import CHATML, toy_tokenizer

ROW = {"prompt": "q ", "chosen": "yes", "rejected": "no"}
LINE = json.dumps(ROW).encode() + b"\n"


class Nasty(NamedTuple):
    name: str
    content: bytes | Callable[[Path], None]  # of the file, or what makes it
    outcome: int | tuple[str, ...]  # rows that are used, or what the error says beside the path


def _line(**changes: object) -> bytes:
    return json.dumps(ROW | changes).encode() + b"\n"


def _with(text: bytes) -> bytes:
    """A good line, then one with `text` as a further value."""
    return LINE + LINE[:-2] + b', "x": ' + text + b"}\n"


JSON = [
    Nasty("a.jsonl", b"\xef\xbb\xbf" + 2 * LINE, 2),
    Nasty("bom_each_line.jsonl", 2 * (b"\xef\xbb\xbf" + LINE), 2),
    Nasty("crlf.jsonl", 2 * LINE.replace(b"\n", b"\r\n"), 2),
    Nasty("blank_lines.jsonl", b"\n \t\n" + LINE + b"\n\x0c\n" + LINE, 2),
    Nasty("no_end.jsonl", LINE + LINE[:-1], 2),
    Nasty(
        "raw_2028.jsonl",
        LINE + '{"prompt": "\u2028", "chosen": "\x85a", "rejected": "b"}'.encode(),
        2,
    ),
    Nasty(
        "every_plane.jsonl",
        _line(chosen="".join(chr(c) for c in range(1, 0x3000) if c < 0xD800)),
        1,
    ),
    Nasty("nul.jsonl", LINE + _line(chosen="a\x00b\x1b[2J"), 2),
    Nasty("ten_megabytes.jsonl", LINE + _line(extra="x" * 10_000_000), 2),
    Nasty("ten_thousand_keys.jsonl", LINE + _line(**{f"k{i}": i for i in range(10_000)}), 2),
    Nasty("odd_keys.jsonl", LINE + _line(**{"": 1, "a.b": 2, "a\nb": 3, "None": 5}), 2),
    Nasty("nul_key.jsonl", _line(**{"prompt\x00": 4}), ("NUL character",)),
    Nasty("mixed_types.jsonl", _line(x=1) + _line(x="1") + _line(x=[1]) + _line(x=None), 4),
    Nasty("deep_enough.jsonl", _with(b"[" * 60 + b"]" * 60), 2),
    Nasty("list.json", b"[" + LINE + b"," + LINE + b"]", 2),
    Nasty("list_bom.json", b"\xef\xbb\xbf [" + LINE + b"]", 1),
    Nasty("lines.json", 2 * LINE, 2),
    Nasty("whole.jsonl.gz", gzip.compress(LINE) + gzip.compress(LINE), 2),
    Nasty("lone_cr.jsonl", 2 * LINE.replace(b"\n", b"\r"), ("line 1", "Extra data")),
    Nasty("list.jsonl", b"[" + LINE + b"]", ("line 1", "not valid JSON")),
    Nasty("list_one_line.jsonl", b"[" + LINE.strip() + b"]\n", ("line 1", "got list")),
    Nasty("pretty.json", json.dumps(ROW, indent=1).encode(), ("line 1", "not valid JSON")),
    Nasty("list_cut.json", b"[" + LINE + b"," + LINE[:20], ("line 2", "not valid JSON")),
    Nasty("list_in_list.json", b"[[" + LINE + b"]]", ("item 0", "got list")),
    Nasty("list_empty.json", b"[]", ("has no rows",)),
    Nasty("string.json", b'"text"', ("line 1", "got str")),
    Nasty("null.jsonl", LINE + b"null\n", ("line 2", "got NoneType")),
    Nasty("number.jsonl", LINE + b"7\n", ("line 2", "got int")),
    Nasty("nan.jsonl", _with(b"NaN"), ("line 2", "NaN is not JSON")),
    Nasty("infinity.jsonl", _with(b"-Infinity"), ("line 2", "-Infinity is not JSON")),
    Nasty("digits.jsonl", _with(b"9" * 5000), ("line 2", "over 64 bits")),
    Nasty("minus_digits.jsonl", _with(b"-" + b"9" * 20), ("line 2", "over 64 bits")),
    Nasty("deep.jsonl", _with(b"[" * 10**5 + b"]" * 10**5), ("line 2", "nested more than 64 deep")),
    Nasty("deep_objects.jsonl", _with(b'{"a":' * 900 + b"1" + b"}" * 900), ("line 2", "64 deep")),
    Nasty("deep_open.jsonl", _with(b"[" * 10**5), ("line 2", "not valid JSON")),
    Nasty(
        "twice.jsonl", LINE + LINE[:-2] + b', "chosen": "b"}\n', ("line 2", "'chosen' occurs twice")
    ),
    Nasty("twice_deep.jsonl", _with(b'{"a": {"b": 1, "b": 1}}'), ("line 2", "'b' occurs twice")),
    Nasty("half_character.jsonl", _line(chosen="\ud800"), ("line 1", "surrogate")),
    Nasty("half_key.jsonl", _with(b'{"\\uDFFF": 1}'), ("line 2", "surrogate")),
    Nasty("latin.jsonl", LINE + b'{"prompt": "\xe9"}\n', ("line 2", "utf-8")),
    Nasty("overlong_utf8.jsonl", LINE + b'{"prompt": "\xc0\xaf"}\n', ("line 2", "utf-8")),
    Nasty("raw_half.jsonl", LINE + b'{"prompt": "\xed\xa0\x80"}\n', ("line 2", "utf-8")),
    Nasty("utf16.jsonl", LINE.decode().encode("utf-16"), ("line 1", "utf-8")),
    Nasty("utf32.jsonl", LINE.decode().encode("utf-32-be"), ("line 1", "not valid JSON")),
    Nasty("zeros.jsonl", LINE + bytes(4096), ("line 2", "not valid JSON")),
    Nasty("only_zeros.jsonl", bytes(4096), ("line 1", "not valid JSON")),
    Nasty("garbage.jsonl", LINE + b"\x8f\x00\xff" * 99, ("line 2", "utf-8")),
    Nasty("two_objects.jsonl", LINE.strip() * 2, ("line 1", "Extra data")),
    Nasty("comma.jsonl", LINE.strip() + b",\n", ("line 1", "Extra data")),
    Nasty("single_quotes.jsonl", LINE.replace(b'"', b"'"), ("line 1", "not valid JSON")),
    Nasty("comment.jsonl", b"// rows\n" + LINE, ("line 1", "not valid JSON")),
    Nasty("control.jsonl", b'{"prompt": "a\tb"}\n', ("line 1", "control character")),
    Nasty("concatenated_cut.jsonl", LINE + LINE[:30], ("line 2", "not valid JSON")),
    Nasty("empty.jsonl", b"", ("has no rows",)),
    Nasty("only_blanks.jsonl", b" \n\r\n\t\n", ("has no rows",)),
    Nasty("no_keys.jsonl", b"{}\n{}\n", ("has no rows",)),
    Nasty("html.jsonl", b"<!DOCTYPE html><html>404</html>", ("line 1", "not valid JSON")),
    Nasty(
        "lfs.jsonl", b"version https://git-lfs.github.com/spec/v1\n", ("line 1", "not valid JSON")
    ),
    Nasty("csv.jsonl", b"prompt,chosen,rejected\na,b,c\n", ("line 1", "not valid JSON")),
    Nasty("rows.csv", b"prompt,chosen,rejected\na,b,c\n", ("expected files that end in",)),
    Nasty("ROWS.JSONL", LINE, ("expected files that end in",)),
    Nasty("rows.pkl", pickle.dumps([ROW]), ("expected files that end in",)),
    Nasty("rows.gz", gzip.compress(LINE), ("expected files that end in",)),
    Nasty("rows.arrow", b"ARROW1", ("expected files that end in",)),
    Nasty("plain.jsonl.gz", LINE, ("gzip",)),
    Nasty("cut.jsonl.gz", gzip.compress(LINE * 99)[:-9], ("end-of-stream",)),
    Nasty("flipped.jsonl.gz", gzip.compress(LINE * 99)[:-8] + bytes(8), ("CRC",)),
    Nasty("tail.jsonl.gz", gzip.compress(LINE) + b"more", ("gzip",)),
    Nasty("empty.jsonl.gz", b"", ("has no rows",)),
]


def _table(**columns: object) -> bytes:
    good = {"prompt": ["q "] * 2, "chosen": ["yes"] * 2, "rejected": ["no"] * 2}
    return _parquet(pa.table({**good, **columns}))


def _parquet(table: pa.Table, **options: object) -> bytes:
    stream = io.BytesIO()
    pq.write_table(table, stream, **options)
    return stream.getvalue()


def _flipped(content: bytes, text: bytes) -> bytes:
    assert text in content
    return content.replace(text, bytes([text[0] ^ 1]) + text[1:], 1)


_TEXTS = pa.array(["yes", "yes"])
_MESSAGES = pa.array([[{"role": "assistant", "content": "a", "at": 0}]] * 2)
_TIMED = pa.array([[{"role": "assistant", "content": "b"}]] * 2)
_DATED = _MESSAGES.cast(
    pa.list_(pa.struct([("role", "string"), ("content", "string"), ("at", pa.timestamp("s"))]))
)
_DOUBLE = pa.Table.from_arrays([_TEXTS] * 4, names=["prompt", "chosen", "chosen", "rejected"])
PARQUET = [
    Nasty("good.parquet", _table(), 2),
    Nasty("nulls.parquet", _table(tools=pa.nulls(2), weight=pa.array([None, 2.0])), 2),
    Nasty("dictionary.parquet", _table(chosen=_TEXTS.dictionary_encode()), 2),
    Nasty("large.parquet", _table(chosen=_TEXTS.cast("large_string")), 2),
    Nasty("views.parquet", _table(chosen=_TEXTS.cast("string_view")), 2),
    Nasty("huge_column.parquet", _table(extra=["x" * 5_000_000, "q "]), 2),
    Nasty("cut.parquet", _table()[:-20], ("cannot be read",)),
    Nasty("no_start.parquet", _table()[100:], ("cannot be read",)),
    Nasty("empty.parquet", b"", ("cannot be read",)),
    Nasty("zeros.parquet", bytes(512), ("cannot be read",)),
    Nasty("json.parquet", LINE, ("cannot be read",)),
    Nasty("zip.parquet", b"PK\x03\x04" + bytes(60), ("cannot be read",)),
    Nasty("footer.parquet", b"PAR1" + b"\xff" * 200 + b"\xc8\x00\x00\x00PAR1", ("cannot be read",)),
    Nasty(
        "no_rows.parquet", _parquet(pa.table({"prompt": pa.array([], "string")})), ("has no rows",)
    ),
    Nasty("cut.parquet.gz", gzip.compress(_table())[:-9], ("end-of-stream",)),
    Nasty("numbers.parquet", _table(chosen=[1, 2]), ("row 0", "chosen is int (1)")),
    Nasty("bytes.parquet", _table(chosen=pa.array([b"a", b"b"])), ("row 0", "chosen is bytes")),
    Nasty("null_side.parquet", _table(chosen=["yes", None]), ("row 1", "expected chosen")),
    Nasty("nan_weight.parquet", _table(weight=[1.0, float("nan")]), ("row 1", "weight=nan")),
    Nasty(
        "dated.parquet",
        _parquet(pa.table({"prompt": ["q", "q"], "chosen": _DATED, "rejected": _TIMED})),
        ("row 0", "datetime"),
    ),
    Nasty("double.parquet", _parquet(_DOUBLE), ("chosen", "twice")),
    Nasty(
        "flipped.parquet",
        _flipped(
            _parquet(
                pa.table({k: [v] * 2 for k, v in ROW.items()}),
                use_dictionary=False,
                compression="none",
                write_page_checksum=True,
                write_statistics=False,
            ),
            b"yes",
        ),
        ("CRC",),
    ),
    Nasty("interval.parquet", _table(x=pa.array([1, 2], pa.duration("s"))), 2),
]


def _folder(**files: bytes) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.mkdir()
        for name, content in files.items():
            (path / name.replace("__", ".")).write_bytes(content)

    return make


def _saved(damage: Callable[[Path], object]) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        datasets.Dataset.from_list([ROW] * 50).save_to_disk(path)
        damage(path)

    return make


def _cut_arrow(path: Path) -> None:
    file = next(path.glob("*.arrow"))
    file.write_bytes(file.read_bytes()[:300])


def _zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("rows.jsonl", LINE)


def _loop(path: Path) -> None:
    path.symlink_to(path)


PLACES = [
    Nasty("empty_folder", _folder(), ("holds no data file",)),
    Nasty("folder.jsonl", _folder(), ("holds no data file",)),
    Nasty(
        "mixed", _folder(a__jsonl=LINE, b__parquet=_table()), ("cannot read a.jsonl, b.parquet",)
    ),
    Nasty("one_broken", _folder(a__jsonl=LINE, b__jsonl=b"{"), ("b.jsonl, line 1",)),
    Nasty("hidden", _folder(__a__jsonl=LINE), ("holds no data file",)),
    Nasty("saved", _saved(lambda path: None), 50),
    Nasty("saved_cut", _saved(_cut_arrow), ("cannot be loaded",)),
    Nasty(
        "saved_state",
        _saved(lambda path: (path / "state.json").write_text("{")),
        ("cannot be loaded",),
    ),
    Nasty(
        "saved_no_files",
        _saved(lambda path: (path / "state.json").write_text("{}")),
        ("cannot be loaded",),
    ),
    Nasty(
        "saved_info",
        _saved(lambda path: (path / "dataset_info.json").write_text("[]")),
        ("cannot be loaded",),
    ),
    Nasty("pipe.jsonl", lambda path: os.mkfifo(path), ("no regular file",)),
    Nasty("device.jsonl", lambda path: path.symlink_to("/dev/zero"), ("no regular file",)),
    Nasty("loop.jsonl", _loop, ("no such file",)),
    Nasty("dangling.jsonl", lambda path: path.symlink_to(path / "nothing"), ("no such file",)),
    Nasty("archive.zip", _zip, ("expected files that end in",)),
    Nasty("missing.jsonl", lambda path: None, ("no such file",)),
    Nasty("n" * 300 + ".jsonl", lambda path: None, ("File name too long",)),
]
ALL = JSON + PARQUET + PLACES


def check_files(folder: Path, every: int = 1) -> tuple[Counter, list[str]]:
    """Counts and failures of every `every`-th nasty file."""
    counts, failures = Counter(), []
    tokenizer = toy_tokenizer(adds_bos=True, chat_template=CHATML)
    for nasty in ALL[::every]:
        path = folder / "nasty" / nasty.name
        path.parent.mkdir(exist_ok=True, parents=True)
        if callable(nasty.content):
            nasty.content(path)
        else:
            path.write_bytes(nasty.content)
        wrong = _wrong_outcome(nasty, path, tokenizer, folder)
        counts["files_read" if isinstance(nasty.outcome, int) else "files_refused"] += 1
        if wrong:
            failures.append(f"file {nasty.name[:40]}: {wrong}")
    return counts, failures


def _wrong_outcome(nasty: Nasty, path: Path, tokenizer, folder: Path) -> str:
    try:
        data = prepare_data(
            {"dataset_name": "auto", "train_data_path": str(path)},
            tokenizer=tokenizer,
            max_total_sequence_length=100_000,
            cache_dir=folder / "files",
        )
    except Exception as error:
        if isinstance(nasty.outcome, int):
            return f"refused: {type(error).__name__}: {str(error)[:300]!r}"
        return unclear(error, nasty.name, *nasty.outcome)
    if data.report["train"]["used"] != nasty.outcome:
        return f"{data.report['train']['used']} rows are used, expected {nasty.outcome}"
    return ""
