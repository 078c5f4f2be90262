"""Progress through work other than steps: lines, bars, and silence on other ranks."""

import io
import re

from rich.console import Console

from reinforcer_tp.progress import Progress


def test_track_prints_about_ten_lines(capsys):
    """A pair a second, from second 100 on: the ETA is the number of pairs left."""
    progress = Progress(60, 0, True, console=Console(file=io.StringIO()), clock=lambda: now_s)
    now_s = 100.0
    with progress.track("reference, training", 960) as track:
        for done in range(4, 961, 4):
            now_s = 100.0 + done
            track.advance(done, "3,210 tokens/s")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 11  # the first call, then each tenth
    assert lines[0] == "reference, training: 4 of 960 pairs | 3,210 tokens/s | ETA 0:15:56"
    assert lines[5] == "reference, training: 480 of 960 pairs | 3,210 tokens/s | ETA 0:08:00"
    assert lines[-1] == "reference, training: 960 of 960 pairs | 3,210 tokens/s | ETA 0:00:00"


def test_track_without_a_rate_or_pairs(capsys):
    progress = Progress(60, 0, True, console=Console(file=io.StringIO()), clock=lambda: 5.0)
    for label, total, done in (("a", 0, 0), ("b", 3, 0), ("c", 3, 3)):
        progress.track(label, total).advance(done)
    assert capsys.readouterr().out.splitlines() == [
        "a: 0 of 0 pairs",
        "b: 0 of 3 pairs",
        "c: 3 of 3 pairs | ETA 0:00:00",
    ]


def test_track_is_silent_on_other_ranks(capsys):
    terminal = Console(file=io.StringIO(), force_terminal=True)
    # A clock without times: nothing is measured either.
    progress = Progress(60, 0, False, console=terminal, clock=iter([]).__next__)
    with progress.track("reference", 10) as track:
        track.advance(10, "1 tokens/s")
    assert terminal.file.getvalue() == ""
    assert capsys.readouterr() == ("", "")


def test_track_has_its_own_bar_before_and_between_steps(capsys):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=150, _environ={"TERM": "xterm"})

    def written() -> str:
        text = screen.getvalue()
        screen.seek(0)
        screen.truncate()
        return text

    with Progress(60, 0, True, console=console, clock=lambda: 5.0) as progress:
        track = progress.track("reference, training", 960)
        track.advance(512, "3,210 tokens/s")
        progress._bar.refresh()
        shown = written()
        assert "512/960 reference, training | 3,210 tokens/s | ETA 0:00:00" in plain(shown)
        assert "0/60" not in shown  # the steps have not begun
        track.close()
        track.close()
        shown = written()
        assert plain(shown).count("reference, training: 512 of 960 pairs | 3,210 tokens/s") == 1
        assert shown.rstrip().endswith("\x1b[?25h")  # the cursor is back
        progress.update(1, {"train/loss": 0.65123})
        progress._bar.refresh()
        assert "1/60 loss 0.6512" in plain(written())
        with progress.track("reference, validation", 8) as track:
            track.advance(8)
            progress._bar.refresh()
            shown = plain(written())
            assert "1/60 loss 0.6512" in shown and "8/8 reference, validation" in shown
        shown = written()
        assert "validation: 8 of 8 pairs" in plain(shown)
        assert "\x1b[?25h" not in shown  # the bar of the steps goes on
        progress.update(2, {"train/loss": 0.65123})
        progress._bar.refresh()
        shown = plain(written())
        assert "2/60" in shown and "validation" not in shown
    assert capsys.readouterr().out == ""


def plain(text: str) -> str:
    """Without colours and cursor movements, runs of blanks as one."""
    return re.sub(r"\s+", " ", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text))
