"""Exit codes, the one line that an error is, and which error has which code. Light: no torch."""

import errno
from enum import IntEnum


class Exit(IntEnum):
    DONE = 0
    DATA = 65
    INTERNAL = 70
    IO = 74
    REQUEUE = 75
    CONFIG = 78
    NO_RESTART = 93


MEANING = {  # of docs/running.md's table, too
    Exit.DONE: "All steps are done.",
    Exit.DATA: "Data, model files or a checkpoint cannot be used as they are; the line names them.",
    Exit.INTERNAL: "A number that is not finite, a wrong first loss, or an error of the program.",
    Exit.IO: "The disk: no space, no permission, a failing device.",
    Exit.REQUEUE: "Stopped by a signal, the stop file or the deadline, a process was lost, or the "
    "folder is in use: the same command goes on.",
    Exit.CONFIG: "The configuration is wrong; nothing was trained.",
    Exit.NO_RESTART: "The third failure in a row at the same step: starting again does not help.",
}
KNOWN = {  # classes that say in one line all there is to say, by name: nothing is imported for it
    "ConfigError": Exit.CONFIG,
    "CheckpointError": Exit.DATA,
    "SaveError": Exit.IO,
    "StoreError": Exit.IO,
    "RunInUseError": Exit.REQUEUE,
    "NonFiniteError": Exit.INTERNAL,
    "FirstStepError": Exit.INTERNAL,
}
DISK_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG, errno.ESTALE),
    *(errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.EMFILE, errno.ENFILE),
}
_OUT_OF_MEMORY = {"OutOfMemoryError", "MemoryError"}


def known_exit(error: BaseException, phase: str) -> Exit | None:
    """The code of an error whose message is enough; None: its traceback is needed."""
    names = [kind.__name__ for kind in type(error).__mro__]
    for name in names:
        if name in KNOWN:
            return KNOWN[name]
    if isinstance(error, ValueError) and phase == "data":  # the files are read there
        return Exit.DATA
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return Exit.IO
    return None


def describe(error: BaseException) -> str:
    """One line: the message of a known error, the class before it for others."""
    text = " ".join(str(error).split("\n\n")[0].split())
    names = {kind.__name__ for kind in type(error).__mro__}
    if names & _OUT_OF_MEMORY:
        return (
            f"{type(error).__name__}: {text[:300]}; lower policy.micro_batch_tokens or "
            "policy.train_micro_batch_size, or raise "
            "policy.megatron_cfg.tensor_model_parallel_size or pipeline_model_parallel_size"
        )
    if names & {*KNOWN, "ValueError"}:
        return text
    return f"{type(error).__name__}: {text[:500]}".removesuffix(": ")


def error_line(code: int, message: str) -> str:
    """What the terminal gets, without secrets."""
    from reinforcer_tp.secrecy import redact

    return redact(f"error[{int(code)}]: {' '.join(message.split())}")
