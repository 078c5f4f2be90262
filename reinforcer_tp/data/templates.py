"""Chat templates are programs that came with a model: they run in a process of their own.

transformers' sandbox keeps them from files and Python's internals, but not from endless loops or
from texts of any size. So a fork renders: the kernel limits its processor time and memory, it
holds no file but two pipes, and nothing that it sends is more than text. It is forked once, rows
go to it by the batch.
"""

import contextlib
import ctypes
import gc
import json
import os
import resource
import signal
import struct
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from jinja2.exceptions import SecurityError
from transformers import PreTrainedTokenizerBase

from reinforcer_tp.data.hub import one_line

CPU_S = 2  # that the three texts of a row may take; at most a second more is noticed
MEMORY_BYTES = 1 << 30  # over what the process had
TEXT_CHARACTERS = 16 << 20  # of a rendered text
TEMPLATE_CHARACTERS = 1 << 20
_UNSENT_BYTES = 1 << 16
_FRAME = struct.Struct("<cQ")  # kind, bytes that follow
_TEXT, _REFUSAL, _LIMIT = b"t", b"r", b"l"
_OURS = "set policy.tokenizer.chat_template to a template that you trust"


class Conversation(NamedTuple):
    """A row of messages and the variables of its template."""

    prompt: list[dict]
    chosen: list[dict]  # the response alone
    rejected: list[dict]
    kwargs: dict[str, Any]


class Refusal(str):
    """Why the template does not take a row."""


Rendered = tuple[str, str, str] | Refusal  # prompt, prompt + chosen, prompt + rejected


class TemplateLimitError(ValueError):
    """The template broke a limit: no row is tried any more."""


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ValueError for a template of a size that no template has."""
    template = tokenizer.chat_template or ""
    texts = template.values() if isinstance(template, dict) else [template]
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"the chat template is {type(text).__name__}, expected text; {_OURS}")
        if len(text) > TEMPLATE_CHARACTERS:
            raise ValueError(
                f"the chat template has {len(text):,} characters, expected at most "
                f"{TEMPLATE_CHARACTERS:,}; {_OURS}"
            )


def render(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Conversation]) -> list[Rendered]:
    """The texts of each row, or why the template refuses it.

    Raises TemplateLimitError: it took too long, too much memory, wrote too much, or reached for
    what is forbidden.
    """
    if not rows:
        return []
    return _renderer(tokenizer).render(rows)


_RENDERERS: dict[tuple, "_Renderer"] = {}  # of this process: at most one, rows come in batches


def _renderer(tokenizer: PreTrainedTokenizerBase) -> "_Renderer":
    names = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    key = (os.getpid(), id(tokenizer), str(tokenizer.chat_template), tuple(sorted(names.items())))
    if key not in _RENDERERS:
        stop_rendering()
        check_template(tokenizer)
        _RENDERERS[key] = _Renderer(tokenizer)
    return _RENDERERS[key]


def stop_rendering() -> None:
    """Ends the process that renders, if there is one; `render` starts it again."""
    while _RENDERERS:
        (pid, *_), renderer = _RENDERERS.popitem()
        if pid == os.getpid():  # else it is the process's from which this one was forked
            renderer.close()


class _Renderer:
    """The parent's end."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer  # keeps its id its own
        requests, self._requests = os.pipe()
        read_end, answers = os.pipe()
        lives_with_parent = threading.current_thread() is threading.main_thread()
        parent = os.getpid()
        self._pid: int | None = os.fork()
        if self._pid == 0:
            try:
                _confine(requests, answers, parent if lives_with_parent else None)
                _serve(tokenizer, requests, answers)
            finally:
                os._exit(1)
        os.close(requests)
        os.close(answers)
        self._answers = open(read_end, "rb")  # noqa: SIM115

    def render(self, rows: Sequence[Conversation]) -> list[Rendered]:
        message = json.dumps(rows).encode()
        try:
            _write(self._requests, _FRAME.pack(_TEXT, len(message)) + message)
            return [self._answer() for _ in rows]
        except (EOFError, BrokenPipeError):
            raise TemplateLimitError(f"{self._cause_of_death()}; {_OURS}") from None

    def _answer(self) -> Rendered:
        kind, text = _receive(self._answers.read)
        if kind == _LIMIT:
            stop_rendering()
            raise TemplateLimitError(f"the chat template {text}; {_OURS}")
        if kind == _REFUSAL:
            return Refusal(text)
        return text, _receive(self._answers.read)[1], _receive(self._answers.read)[1]

    def _cause_of_death(self) -> str:
        status = self._wait()
        stop_rendering()
        number = os.WTERMSIG(status) if status is not None and os.WIFSIGNALED(status) else None
        if number == signal.SIGXCPU:
            return f"the chat template took more than {CPU_S} s for a row"
        what = f"signal {number}" if number is not None else "no answer"
        return f"the chat template's process died ({what}): it may have run out of memory or stack"

    def _wait(self) -> int | None:
        pid, self._pid = self._pid, None
        with contextlib.suppress(ChildProcessError):  # somebody else collects children here
            return None if pid is None else os.waitpid(pid, 0)[1]

    def close(self) -> None:
        os.close(self._requests)
        self._answers.close()
        if self._pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
            self._wait()


def _confine(requests: int, answers: int, parent: int | None) -> None:
    """Signals are for the parent; files closed; memory limited; no life after the parent's."""
    signal.set_wakeup_fd(-1)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    for name in ("SIGXCPU", "SIGPIPE"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    if sys.platform == "linux" and parent is not None:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 = PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    low, high = sorted((requests, answers))
    os.closerange(3, low)
    os.closerange(low + 1, high)
    os.closerange(high + 1, os.sysconf("SC_OPEN_MAX"))
    gc.freeze()  # a collection would copy every page
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        with open("/proc/self/statm") as file:
            size = int(file.read().split()[0]) * resource.getpagesize()
        _lower(resource.RLIMIT_AS, size + MEMORY_BYTES)


def _lower(kind: int, limit: int) -> None:
    """The soft limit; the hard one stays, as what is lowered there is lowered for good."""
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def _serve(tokenizer: PreTrainedTokenizerBase, requests: int, answers: int) -> None:
    while True:
        try:
            _, message = _receive(partial(os.read, requests))
        except EOFError:
            return
        unsent = bytearray()  # a call of the system for many rows
        for row in json.loads(message):
            for kind, text in _texts(tokenizer, Conversation(*row)):
                content = text.encode("utf-8", "surrogatepass")
                unsent += _FRAME.pack(kind, len(content)) + content
            if len(unsent) > _UNSENT_BYTES:
                _write(answers, bytes(unsent))
                unsent.clear()
        _write(answers, bytes(unsent))


def _texts(tokenizer: PreTrainedTokenizerBase, row: Conversation) -> list[tuple[bytes, str]]:
    _lower_cpu()
    try:
        texts = list(_apply(tokenizer, row))
    except (MemoryError, RecursionError) as error:
        what = "memory" if isinstance(error, MemoryError) else "recursion"
        return [(_LIMIT, f"takes too much {what}")]
    except (OverflowError, SecurityError) as error:
        return [(_LIMIT, f"does what a template may not: {one_line(error)}")]
    except Exception as error:  # the edge to a program that others wrote
        return [(_REFUSAL, one_line(error))]
    longest = max(map(len, texts))
    if longest > TEXT_CHARACTERS:
        return [(_LIMIT, f"wrote {longest:,} characters, expected at most {TEXT_CHARACTERS:,}")]
    return [(_TEXT, text) for text in texts]


def _apply(tokenizer: PreTrainedTokenizerBase, row: Conversation) -> Iterator[str]:
    apply, kwargs = tokenizer.apply_chat_template, row.kwargs
    yield apply(row.prompt, add_generation_prompt=True, tokenize=False, **kwargs)
    yield from apply([row.prompt + row.chosen, row.prompt + row.rejected], tokenize=False, **kwargs)


def _lower_cpu() -> None:
    """The kernel ends this process after CPU_S s of processor time from now, rounded up."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _lower(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + CPU_S + 1)


def _receive(read: Callable[[int], bytes]) -> tuple[bytes, str]:
    kind, size = _FRAME.unpack(_read(read, _FRAME.size))
    return kind, _read(read, size).decode("utf-8", "surrogatepass")


def _read(read: Callable[[int], bytes], size: int) -> bytes:
    parts = []
    while size > 0:
        part = read(min(size, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _write(pipe: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(pipe, view) :]
