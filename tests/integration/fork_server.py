"""Forks runs of train.py from a process that has imported what they import; a script.

    python fork_server.py SOCKET TRAIN_PY

SOCKET is the number of an inherited socket. Each message on it is one run in JSON (`script`,
`arguments`, `environment`, `cwd`, `nproc`) with three files: stdout, stderr and a pipe. For each
run a keeper is forked, which plays the shell or torchrun: it starts the run's processes and writes
two integers to the pipe, its own process id and, once all of them have ended, the exit status.
The server itself ends when nobody holds the other end of SOCKET any more.
"""

import ast
import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

INTEGER = struct.Struct("i")
MARK = "REINFORCER_TP_TEST_RUN"  # in the environment of every process of a run
LARGEST_MESSAGE = 1 << 20  # bytes
QUICK_EXIT = "REINFORCER_TP_TEST_QUICK_EXIT"  # when set, an ended run does not tidy up its modules
CODES = "REINFORCER_TP_TEST_CODES"  # names a file that gets a line "rank exit-code" for each end
LAZY = (  # what is imported only when it is asked for
    "transformers.models.auto",
    "transformers.models.llama.configuration_llama",
    "transformers.models.llama.modeling_llama",
    "torch.distributed.tensor",
    "datasets.packaged_modules.generator.generator",
    "numpy.ctypeslib",
)


def imported_by(script: Path) -> Iterator[str]:
    """Modules that `script` imports at its top or in any of its functions."""
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


def import_everything(script: Path) -> None:
    """What a run imports. Forks share it, hence no thread, process group or CUDA context yet."""
    from reinforcer_tp.train import quiet_libraries

    quiet_libraries()
    for module in [*imported_by(script), *LAZY]:
        importlib.import_module(module)
    import torch

    assert not torch.cuda.is_initialized() and not torch.distributed.is_initialized()
    threads = {path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")}
    own = Path("/proc/self/comm").read_text().strip()
    # A fork has only the thread that forks; pyarrow's jemalloc starts its own again when it must.
    assert threads <= {own, "jemalloc_bg_thd"}, f"threads: {threads}"
    gc.collect()
    gc.freeze()  # a collection in a fork would copy every page


def next_run(control: socket.socket) -> tuple[dict, int]:
    """(run, its rank) in each process of a run, ready to become it; in the server never."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody has to collect the keepers
    while True:
        message, files, *_ = socket.recv_fds(control, LARGEST_MESSAGE, 3)
        if not message:
            sys.exit()
        if os.fork() == 0:
            control.close()
            run = json.loads(message)
            return run, keep(run, *files)
        for file in files:
            os.close(file)


def keep(run: dict, stdout: int, stderr: int, pipe: int) -> int:
    """The keeper: returns the rank in each process that it starts, and ends with the last one."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    wear(run["environment"][MARK])
    running: set[int] = set()
    listener = socket.create_server(("127.0.0.1", 0))  # no other run can have this port
    if run["nproc"] is not None:
        run["environment"]["MASTER_PORT"] = str(listener.getsockname()[1])
    for rank in range(run["nproc"] or 1):
        pid = os.fork()
        if pid == 0:
            os.close(pipe)
            listener.close()
            os.dup2(stdout, 1)
            os.dup2(stderr, 2)
            os.close(stdout)
            os.close(stderr)
            return rank
        running.add(pid)
    # Not before the forks: one that has just begun would swallow a signal meant for it.
    signal.signal(signal.SIGTERM, lambda *_: terminate(running))
    os.write(pipe, INTEGER.pack(os.getpid()))
    os.write(pipe, INTEGER.pack(exit_status(run, running, listener)))
    os._exit(0)


def exit_status(run: dict, running: set[int], listener: socket.socket) -> int:
    """Waits for all; as under torchrun, one that fails ends the others and makes the status 1."""
    if run["nproc"] is None:
        [pid] = running
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    from torch.distributed import TCPStore

    where = run["environment"]  # like torchrun, the keeper holds the store, and outlives the ranks
    store = TCPStore(
        *(where["MASTER_ADDR"], int(where["MASTER_PORT"])),
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    failed, ranks = 0, {pid: rank for rank, pid in enumerate(sorted(running))}
    while running:
        pid, status = os.wait()
        running.discard(pid)
        if CODES in where:
            with open(where[CODES], "a") as file:
                file.write(f"{ranks[pid]} {os.waitstatus_to_exitcode(status)}\n")
        if status != 0 and not failed:
            failed = 1
            terminate(running)
    del store
    return failed


def terminate(running: set[int]) -> None:
    for pid in list(running):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)


def wear(mark: str) -> None:
    """Overwrite the server's own mark where /proc/<pid>/environ shows it."""
    getenv = ctypes.CDLL(None).getenv
    getenv.restype = ctypes.c_void_p
    assert len(os.environ[MARK]) == len(mark)
    ctypes.memmove(getenv(MARK.encode()), mark.encode(), len(mark))


def become(run: dict, rank: int) -> None:
    """What a new process finds: its environment, arguments, import path and working directory."""
    os.environ.clear()
    os.environ.update(run["environment"])
    if run["nproc"] is not None:
        os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank)})
    sys.argv[:] = [run["script"], *run["arguments"]]
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    new = [path for path in paths if path and path not in sys.path]
    sys.path[:0] = [str(Path(run["script"]).parent), *new]
    os.chdir(run["cwd"])


def leave(end: SystemExit) -> None:
    """As the interpreter does, but for half a second of taking modules apart."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(end.code if isinstance(end.code, int) else 0 if end.code is None else 1)


if __name__ == "__main__":
    del sys.path[0]  # this file's folder
    import_everything(Path(sys.argv[2]))
    run, rank = next_run(socket.socket(fileno=int(sys.argv[1])))
    become(run, rank)
    try:
        runpy.run_path(run["script"], run_name="__main__")  # and end as any script does
    except SystemExit as end:
        if QUICK_EXIT not in os.environ:
            raise
        leave(end)
