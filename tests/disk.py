"""Disks after a power cut: record the file operations of an action, and rebuild every state that they may leave behind."""

import itertools
import os
import pathlib
import shutil

import pytest

from lmnotes import core, files
from lmnotes.runs import folder as runs_folder
from lmnotes.training import checkpoint

ROOT_FOLDER = 0
linux = pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="open files are named through /proc")


class Recorder:
    "Record every file operation in a folder as (what, path, ...), with paths relative to the folder"

    def __init__(self, folder, monkeypatch):
        self.folder, self.operations = folder, []
        self.real = dict(
            open=open, replace=os.replace, fsync=os.fsync, unlink=os.unlink, rmdir=os.rmdir, mkdir=os.mkdir
        )
        for module in (core, files, checkpoint):
            monkeypatch.setattr(module, "open", self.open, raising=False)
        self.real["exchange"] = files.exchange_paths
        for module in (files, runs_folder):
            monkeypatch.setattr(module, "exchange_paths", self.exchange)
        monkeypatch.setattr(os, "replace", self.replace)
        monkeypatch.setattr(os, "fsync", self.fsync)
        monkeypatch.setattr(shutil, "rmtree", self.rmtree)
        monkeypatch.setattr(pathlib.Path, "unlink", lambda path, missing_ok=False: self.unlink(path, missing_ok))
        monkeypatch.setattr(
            pathlib.Path, "mkdir", lambda path, parents=False, exist_ok=False: self.mkdir(path, parents, exist_ok)
        )

    def note(self, what, path, *rest):
        self.operations.append((what, os.path.relpath(path, self.folder), *rest))

    def open(self, path, mode="r", buffering=-1, **how):
        if mode[0] not in "wax":
            return self.real["open"](path, mode, buffering, **how)
        if mode[0] in "wx" or not os.path.exists(path):
            self.note("create", path)
        file = self.real["open"](path, mode, buffering=0, opener=how.get("opener"))
        recorder = self

        class File:
            def write(self, data):
                recorder.note("write", path, bytes(data))
                return file.write(data)

            def flush(self):
                pass

            def fileno(self):
                return file.fileno()

            def seek(self, *where):
                return file.seek(*where)

            def __enter__(self):
                return self

            def __exit__(self, *exc):
                file.close()

        return File()

    def replace(self, source, target):
        self.real["replace"](source, target)
        self.note("replace", source, os.path.relpath(target, self.folder))

    def exchange(self, source, target):
        self.real["exchange"](source, target)
        self.note("exchange", source, os.path.relpath(target, self.folder))

    def fsync(self, descriptor):
        self.note("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))

    def mkdir(self, path, parents=False, exist_ok=False):
        if parents and not os.path.isdir(path.parent):
            self.mkdir(path.parent, parents, exist_ok)
        if not (exist_ok and os.path.isdir(path)):
            self.real["mkdir"](path)
            self.note("mkdir", path)

    def unlink(self, path, missing_ok=False):
        if path.exists() or not missing_ok:
            self.real["unlink"](path)
            self.note("remove", path)

    def rmtree(self, folder, ignore_errors=False):
        if not os.path.exists(folder) and ignore_errors:
            return
        for path in sorted(pathlib.Path(folder).iterdir()):
            self.rmtree(path) if path.is_dir() else self.unlink(path)
        self.real["rmdir"](folder)
        self.note("remove", folder)

    def as_writes(self, function, folder):
        """Return a function that writes into `folder(*args)`, recorded as plain writes of the files that it leaves there

        Other libraries write in ways that we do not record. A flush inside the function does not count.
        """

        def recorded(*args):
            before, root = len(self.operations), pathlib.Path(folder(*args))
            result = function(*args)
            del self.operations[before:]
            for path in sorted(root.rglob("*")):
                if path.is_dir():
                    self.note("mkdir", path)
                else:
                    self.note("create", path)
                    self.note("write", path, path.read_bytes())
            return result

        return recorded


class Disk:
    "Folders and files, as a process sees them now and as they may be after a power cut"

    def __init__(self):
        self.seen = {ROOT_FOLDER: {}}  # {folder: {name: file or folder}}
        self.kept = {ROOT_FOLDER: {}}  # The flushed part of it
        self.pending = []  # Name changes that were not flushed, in order, each as [(folder, name, file or None)]
        self.data, self.flushed = {}, {}  # {file: content}
        self.number = itertools.count(1)

    def find(self, path):
        at = ROOT_FOLDER
        for name in [] if path == "." else path.split("/"):
            at = self.seen[at][name]
        return at

    def entry(self, path):
        folder, _, name = path.rpartition("/")
        return self.find(folder or "."), name

    def change(self, *changes):
        _change(self.seen, changes)
        self.pending.append(changes)

    def apply(self, what, path, *rest):
        "Apply one recorded operation"
        if what == "mkdir":
            self.change((*self.entry(path), new := next(self.number)))
            self.seen[new], self.kept[new] = {}, {}
        elif what == "create":
            folder, name = self.entry(path)
            if name not in self.seen[folder]:
                self.change((folder, name, next(self.number)))
            self.data[self.find(path)] = b""
        elif what == "write":
            self.data[self.find(path)] += rest[0]
        elif what == "replace":
            self.change((*self.entry(path), None), (*self.entry(rest[0]), self.find(path)))
        elif what == "exchange":
            self.change((*self.entry(path), self.find(rest[0])), (*self.entry(rest[0]), self.find(path)))
        elif what == "remove":
            self.change((*self.entry(path), None))
        elif what == "fsync":
            self.flush(self.find(path))

    def flush(self, node):
        if node in self.data:
            self.flushed[node] = self.data[node]
            return
        self.kept[node] = dict(self.seen[node])
        self.pending = [changes for changes in self.pending if not any(folder == node for folder, _, _ in changes)]
        reachable = self._reachable()
        self.pending = [changes for changes in self.pending if any(folder in reachable for folder, _, _ in changes)]

    def _reachable(self):
        "Return the folders that have a name, now or after a power cut"
        found, todo = set(), [ROOT_FOLDER]
        while todo:
            folder = todo.pop()
            if folder in self.seen and folder not in found:
                found.add(folder)
                todo += [*self.seen[folder].values(), *self.kept[folder].values()]
                todo += [node for changes in self.pending for place, _, node in changes if place == folder]
        return found

    def states(self):
        """Yield every {path: content, or None for a folder} that may be on the disk after a power cut now

        Of more than five name changes that were not flushed, the older ones are lost or kept together.
        """
        older = max(0, len(self.pending) - 5)
        for first, *rest in itertools.product((True, False), repeat=len(self.pending) - older + 1):
            kept = [first] * older + rest
            if not older and not first:
                break
            names = {folder: dict(entries) for folder, entries in self.kept.items()}
            for changes in itertools.compress(self.pending, kept):
                _change(names, changes)
            for spoil in SPOIL:
                yield dict(_paths(names, {f: self.content(f, spoil) for f in self.data}))

    def content(self, file, spoil):
        "Return what a power cut may leave of a file. Data that was flushed before an append stays"
        flushed, written = self.flushed.get(file, b""), self.data[file]
        if written.startswith(flushed):
            return flushed + (spoil(b"", written[len(flushed) :]) if written != flushed else b"")
        return spoil(flushed, written)


# Possible contents of a file that was not flushed, computed from its flushed and its written content.
SPOIL = [
    lambda flushed, written: written,
    lambda flushed, written: flushed,
    lambda flushed, written: written[: len(written) // 2],
    lambda flushed, written: written[:-1],
    lambda flushed, written: bytes(len(written)),
    lambda flushed, written: written[: len(written) // 2] + bytes(len(written) - len(written) // 2),
]


def _change(names, changes):
    for folder, name, node in changes:
        if node is None:
            names[folder].pop(name, None)
        else:
            names[folder][name] = node


def _paths(names, found, folder=ROOT_FOLDER, prefix=""):
    for name, node in names[folder].items():
        if node in names:
            yield prefix + name, None
            yield from _paths(names, found, node, f"{prefix}{name}/")
        else:
            yield prefix + name, found[node]


def build(folder, state):
    "Write a state of the disk into an empty folder"
    for path, content in state.items():
        if content is None:
            (folder / path).mkdir()
        else:
            (folder / path).write_bytes(content)
