"""Files that are there whole or not at all, also after a crash. Imports no torch."""

import errno
import os
import re
import secrets
import socket
from contextlib import suppress
from pathlib import Path

BUILDING_NAME = re.compile(r"\.tmp-[A-Za-z0-9_.-]*-\d+-[0-9a-f]{16}")


def building_name(folder: Path) -> Path:
    """A name of its own for a file that is not whole yet; BUILDING_NAME matches it."""
    host = re.sub(r"[^A-Za-z0-9_.-]", "", socket.gethostname())
    return folder / f".tmp-{host}-{os.getpid()}-{secrets.token_hex(8)}"


def write_whole(path: Path, content: bytes) -> None:
    """Writes, syncs and renames. Raises OSError, and leaves nothing behind then."""
    building = building_name(path.parent)
    try:
        with open(building, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(building, path)
    finally:
        with suppress(OSError):  # gone when all went well
            building.unlink()
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes names in `folder` durable. Raises OSError."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems sync no folders
            raise
    finally:
        os.close(handle)
