"""Faults at the file operations of a process in one folder: kills, errors of the file system, and changes from outside.

An audit hook sees every file that is opened, renamed or removed, before it happens. Writes, flushes and exchanges of folders have
no audit event, so we wrap them.
"""

import builtins
import errno
import io
import itertools
import os
import signal
import sys
from pathlib import Path

from lmnotes import files
from lmnotes.runs import folder as runs_folder

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
REMOVALS = {
    "os.remove": 1,
    "os.rmdir": 1,
    "os.mkdir": 2,
}  # Position of the descriptor of the folder that a path is relative to


def watch_operations(folder, act) -> None:
    """Call `act(kind, path, half)` in this process before each file operation in a folder. An error that it raises is the operation's

    Kinds are open, read, write, truncate, fsync, rename, exchange, remove, rmdir and mkdir. `half()` does the first half of a write.
    """
    root, real_open, real_fsync = os.path.realpath(folder), builtins.open, os.fsync

    def note(kind, path, base=-1, half=lambda: None):
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        path = os.fsdecode(path)
        if base >= 0:
            path = os.path.join(os.readlink(f"/proc/self/fd/{base}"), path)
        path = os.path.abspath(path)
        if path == root or path.startswith(root + os.sep):
            act(kind, os.path.relpath(path, root), half)

    def hook(event, args):
        if event == "open" and isinstance(args[0], (str, bytes)):
            note("open" if args[2] & WRITES else "read", args[0])
        elif event == "os.rename":
            note("rename", args[1], args[3])
        elif event in REMOVALS:
            note(event.removeprefix("os."), args[0], args[REMOVALS[event]])

    class WatchedFile(io.FileIO):
        def write(self, data):
            data = memoryview(data).cast("B")
            note("write", self.name, half=lambda: super(WatchedFile, self).write(data[: len(data) // 2]))
            return super().write(data)

        def truncate(self, size=None):
            note("truncate", self.name)
            return super().truncate(size)

    def watched_open(path, mode="r", *args, **kwargs):
        inside = isinstance(path, (str, os.PathLike)) and os.path.abspath(path).startswith(root + os.sep)
        if inside and mode in ("wb", "ab", "xb"):
            return WatchedFile(os.fspath(path), mode[0], opener=kwargs.get("opener"))
        return real_open(path, mode, *args, **kwargs)

    def fsync(descriptor):
        note("fsync", descriptor)
        return real_fsync(descriptor)

    def exchange(a, b, real=files.exchange_paths):
        note("exchange", os.fspath(b))
        return real(a, b)

    builtins.open, os.fsync = watched_open, fsync
    files.exchange_paths = runs_folder.exchange_paths = exchange
    sys.addaudithook(hook)


CHANGES = "open", "write", "truncate", "rename", "exchange", "remove", "rmdir", "mkdir"


def record_operations(function, *args, kinds=CHANGES):
    "Call a function, and write its operations in `runs` to the file `operations`, one a line"
    operations = []
    watch_operations("runs", lambda kind, path, half: operations.append(f"{kind} {path}") if kind in kinds else None)
    code = function(*args)
    Path("operations").write_text("\n".join(operations))
    return code


def kill_at(number, function, *args):
    "Call a function, and kill this process at its `number`-th change in `runs`, or the first that starts with a text, halfway in a write"
    count = itertools.count(1)

    def act(kind, path, half):
        if kind in CHANGES:
            if number == next(count) or isinstance(number, str) and f"{kind} {path}".startswith(number):
                half()
                os.kill(os.getpid(), signal.SIGKILL)

    watch_operations("runs", act)
    return function(*args)


def fail_from(number, name, lasting, function, *args, kinds=(*CHANGES, "fsync")):
    """Call a function whose `number`-th operation of `kinds` in `runs` fails with the error `name`, and all later ones if `lasting`

    A write fails when half of it is written. Removals succeed on a full disk.
    """
    count, code = itertools.count(1), getattr(errno, name)

    def act(kind, path, half):
        if kind not in kinds or (name in ("ENOSPC", "EDQUOT") and kind in ("remove", "rmdir", "truncate")):
            return
        n = next(count)
        if n == number or (lasting and n > number):
            half()
            names = (
                [os.path.join("runs", path)] if kind not in ("write", "truncate", "fsync") else []
            )  # As the system does
            raise OSError(code, os.strerror(code), *names)

    watch_operations("runs", act)
    return function(*args)
