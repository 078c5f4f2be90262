"""A headless Chromium that opens one page: pictures of reports, and their tests.

It speaks the DevTools protocol (https://chromedevtools.github.io/devtools-protocol) over a pair of
pipes, --remote-debugging-pipe: JSON messages that each end with a NUL. No port, no driver.
"""

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_FLAGS = (
    *("--headless", "--remote-debugging-pipe", "--disable-gpu", "--disable-quic"),
    *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--disable-breakpad", "--disable-dev-shm-usage", "--hide-scrollbars"),
    *("--disable-extensions", "--host-resolver-rules=MAP * ~NOTFOUND"),
)
# True in a report once all charts are there.
DRAWN = "document.documentElement?.dataset.drawn !== undefined"
_ANSWER_S = 60.0
_END_S = 10.0


class BrowserError(RuntimeError):
    """Chromium is missing, ended, took too long, or could not do what it was asked."""


def find_browser() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One tab. `with` ends it and all its processes."""

    def __init__(self) -> None:
        executable = find_browser()
        if executable is None:
            raise BrowserError(f"found none of {', '.join(NAMES)}; install Chromium")
        self.events: list[dict[str, Any]] = []  # what the tab told of its own accord, in order
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self._pid, self._read, self._write = _spawn(executable, Path(self._profile.name))
        self._buffer, self._last_id, self._session = b"", 0, None
        try:
            tab = self.ask("Target.createTarget", url="about:blank")["targetId"]
            attached = self.ask("Target.attachToTarget", targetId=tab, flatten=True)
            self._session = attached["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.ask(f"{domain}.enable")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Asks it to end, and kills what is left of its process group."""
        with contextlib.suppress(BrowserError, OSError):
            self._session = None
            self.ask("Browser.close")
        os.close(self._write)
        os.close(self._read)
        deadline = time.monotonic() + _END_S
        while os.waitpid(self._pid, os.WNOHANG)[0] == 0:
            if time.monotonic() > deadline:
                os.killpg(self._pid, signal.SIGKILL)
                os.waitpid(self._pid, 0)
                break
            time.sleep(0.02)
        with contextlib.suppress(ProcessLookupError):  # helpers that outlived it
            os.killpg(self._pid, signal.SIGKILL)
        self._profile.cleanup()

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The answer to a command of the protocol. BrowserError."""
        self._last_id += 1
        message = {"id": self._last_id, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        try:
            os.write(self._write, json.dumps(message).encode() + b"\0")
        except BrokenPipeError:
            raise BrowserError(f"Chromium ended before {method}") from None
        while (answer := self._receive(method)).get("id") != self._last_id:
            self.events.append(answer)
        if "error" in answer:
            raise BrowserError(f"{method}: {answer['error'].get('message')}")
        return answer["result"]

    def _receive(self, method: str) -> dict[str, Any]:
        deadline = time.monotonic() + _ANSWER_S
        while b"\0" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._read], [], [], left)[0]:
                raise BrowserError(f"no answer to {method} within {_ANSWER_S:.0f} s")
            part = os.read(self._read, 1 << 20)
            if not part:
                raise BrowserError(f"Chromium ended during {method}")
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def value(self, expression: str) -> Any:
        """What a JavaScript expression is in the page; of a promise what it becomes."""
        options = {"returnByValue": True, "awaitPromise": True}
        answer = self.ask("Runtime.evaluate", expression=expression, **options)
        if "exceptionDetails" in answer:
            raise BrowserError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def show(self, width: int, height: int, *, dark: bool = False, phone: bool = False) -> None:
        """Sets the viewport, in CSS pixels, and the colour scheme that the page is asked for."""
        sizes = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": phone}
        self.ask("Emulation.setDeviceMetricsOverride", **sizes)
        self.ask("Emulation.setTouchEmulationEnabled", enabled=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, page: Path, until: str, timeout_s: float = 120.0) -> None:
        """Opens a file and waits until the JavaScript expression `until` is true."""
        self.ask("Page.navigate", url=page.resolve().as_uri())
        self.wait(until, timeout_s)

    def wait(self, until: str, timeout_s: float = 60.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not self.value(until):
            if time.monotonic() > deadline:
                raise BrowserError(f"{until} was not true after {timeout_s:.0f} s")
            time.sleep(0.05)

    def screenshot(self, out: Path) -> None:
        """The viewport as a PNG file."""
        picture = self.ask("Page.captureScreenshot", format="png", optimizeForSpeed=False)
        out.write_bytes(base64.b64decode(picture["data"]))


def _spawn(executable: str, profile: Path) -> tuple[int, int, int]:
    """(process id, end to read from, end to write to); Chromium has its ends as 3 and 4."""
    flags = [*_FLAGS, f"--user-data-dir={profile}"]
    if os.geteuid() == 0:
        flags.append("--no-sandbox")  # root has none
    # Numbers that 3 and 4 cannot overwrite.
    ends = [_moved(fd) for pair in (os.pipe(), os.pipe()) for fd in pair]
    its_read, our_write, our_read, its_write = ends
    nowhere = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1, 2)]
    places = [(os.POSIX_SPAWN_DUP2, its_read, 3), (os.POSIX_SPAWN_DUP2, its_write, 4)]
    pid = os.posix_spawn(
        executable,
        [executable, *flags, "about:blank"],
        dict(os.environ) | {"HOME": str(profile)},
        file_actions=[*nowhere, *places],
        setsid=True,
    )
    os.close(its_read)
    os.close(its_write)
    return pid, our_read, our_write


def _moved(fd: int) -> int:
    moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(fd)
    return moved
