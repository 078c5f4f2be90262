"""One HTML page of a run, or of several side by side.

    python -m reinforcer_tp.report RUN_DIR [RUN_DIR ...] [--out FILE] [--open]

RUN_DIR is the logger.log_dir of a run. The page of one run is RUN_DIR/report.html, which the
trainer writes, too; of several it is ./comparison.html. It needs no network and nothing beside it.
"""

import argparse
import sys
import webbrowser
from pathlib import Path

from reinforcer_tp.report.page import write_report
from reinforcer_tp.report.read import ReportError
from reinforcer_tp.secrecy import RedactingParser

_EXIT_FAILED = 1


def main(argv: list[str]) -> int:
    arguments = _parse(argv)
    out = arguments.out
    if out is None and len(arguments.runs) > 1:
        out = Path("comparison.html")
    try:
        page = write_report(arguments.runs, out)
        print(page)
        if arguments.screenshot is not None:
            _take_picture(page, arguments)
            print(arguments.screenshot)
    except (ReportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return _EXIT_FAILED
    if arguments.open and not webbrowser.open(page.resolve().as_uri()):
        print("there is no browser to open it with", file=sys.stderr)
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = RedactingParser(prog="python -m reinforcer_tp.report", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR")
    parser.add_argument("--out", type=Path, help="the file to write")
    parser.add_argument("--open", action="store_true", help="open it in the default browser")
    parser.add_argument(
        "--screenshot", type=Path, metavar="PNG", help="also a picture of its top; needs Chromium"
    )
    parser.add_argument("--dark", action="store_true", help="of the picture: dark colours")
    parser.add_argument(
        "--size", default="1240x1500", type=_size, help="of the picture in pixels: 1240x1500"
    )
    return parser.parse_args(argv)


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; expected WIDTHxHEIGHT")
    return int(width), int(height)


def _take_picture(page: Path, arguments: argparse.Namespace) -> None:
    from reinforcer_tp.report.browser import DRAWN, Browser, BrowserError

    try:
        with Browser() as browser:
            browser.show(*arguments.size, dark=arguments.dark, phone=arguments.size[0] < 600)
            browser.open(page, DRAWN)
            browser.screenshot(arguments.screenshot)
    except BrowserError as error:
        raise ReportError(f"no picture: {error}") from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
