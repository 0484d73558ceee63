"""Makes every code cell of nbs/**/*.ipynb a test, so that `pytest` alone runs notebooks and process tests.

`pytest nbs/nn/20_lm.ipynb` runs one notebook; `-k "20_lm and cell8"` one cell, after the cells above it. Cells that carry a
test flag of settings.ini (`#| slow`, `#| cuda`) run only with `--flags slow` or `--flags "slow cuda"`; cells with
`#| eval: false` never run. The Python code in a `<details>` block of a text, which is the solution of an exercise, is a test too.
All notebooks of a worker share one process, each with a namespace of its own.
"""

import atexit
import os
import re
import shutil
import signal
import sys
import tempfile
import traceback
from datetime import date
from pathlib import Path

# One thread a process, said before torch is imported: tests run side by side, and sums come out the same everywhere.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell that starts this in the background has it ignore SIGINT, and so everything that it starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The tests write, flush and remove many small files, which costs nothing in memory. Set TMPDIR to a folder on a disk, and they use that.
MEMORY = Path("/dev/shm")
if "TMPDIR" not in os.environ and os.access(MEMORY, os.W_OK):
    disk = os.statvfs(MEMORY)
    if disk.f_bavail * disk.f_frsize > 4e9 and not disk.f_flag & os.ST_NOEXEC:
        os.environ["TMPDIR"], tempfile.tempdir = str(MEMORY), None

# Runs that tests make without naming a folder stay out of checkpoints/. Each worker has a folder of its own, so that the last run in
# it is a run of its own.
if "LMNOTES_OUT_DIR" not in os.environ:
    scratch = tempfile.mkdtemp(prefix="lmnotes-test-")
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    os.environ["LMNOTES_OUT_DIR"] = f"{scratch}/runs"
    os.environ["IPYTHONDIR"] = f"{scratch}/ipython"
elif "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["LMNOTES_OUT_DIR"] += f"/{os.environ['PYTEST_XDIST_WORKER']}"

import pytest

HERE = Path(__file__).parent
CELL_SECONDS = 3600  # Only ends a cell that hangs
SOLUTION = re.compile(r"^<details.*?^```python\n(.*?)^```.*?^</details>", re.M | re.S)
SLOWEST = "exactness_matrix ranks readme fresh_or_resume nanothink_recipe compare agiformer export docs verify foreign_weights exact"
SLOWEST += (
    " guides text_only signals papermill_train resume_auto power_cuts kills damaged_runs foreign_data disk_errors"
)
# `-m nightly` trains as the README says, in tests/test_readme.py
SHORTER = "nbs/train.ipynb", "nbs/generate.ipynb", "nbs/playground.ipynb"
SHORT = dict(LMNOTES_STEPS="40", LMNOTES_BATCH_SIZE="2", LMNOTES_MODEL_ARGS="d_model=64 n_layers=2 n_heads=2")


def pytest_configure(config):
    "Let no property test fail because the machine is slow"
    from hypothesis import HealthCheck, settings

    settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("any machine")


def pytest_report_header(config):
    "Print the seed of the long tests of mutated files"
    if "nightly" in config.option.markexpr and "not nightly" not in config.option.markexpr:
        return f"FUZZ_SEED={os.environ.setdefault('FUZZ_SEED', str(date.today().toordinal()))}"


def pytest_terminal_summary(terminalreporter, config):
    "Print the results of the suite of trust, and write them to docs/trust.md with --trust-table"
    kinds = "passed", "failed", "skipped", "error"
    reports = [report for kind in kinds for report in terminalreporter.stats.get(kind, []) if hasattr(report, "when")]
    if not any(report.nodeid.startswith("tests/") for report in reports):
        return
    import trust_table

    found = trust_table.results(reports)
    if found:
        terminalreporter.section("trust")
        terminalreporter.write_line("\n".join(trust_table.summary_lines(found)))
    if config.getoption("--trust-table"):
        terminalreporter.write_line(trust_table.write_page(found))


def pytest_collection_modifyitems(items):
    "Move the slowest files to the front, where two processes can share them"
    order = {f"test_{name}.py": i for i, name in enumerate(SLOWEST.split())}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


def pytest_addoption(parser):
    parser.addoption("--flags", default="", help="test flags whose cells run, e.g. --flags 'slow cuda'")
    parser.addoption(
        "--trust-table", action="store_true", help="write the results of the suite of trust to docs/trust.md"
    )


def pytest_collect_file(file_path, parent):
    hidden = any(part.startswith((".", "_")) for part in file_path.relative_to(HERE).parts)
    if file_path.suffix == ".ipynb" and not hidden:
        return Notebook.from_parent(parent, path=file_path)


class CellFailed(Exception):
    "Carries the cell that failed and its exception to the report"


def code_of(cell):
    "Return the code of a cell: its source, or the solutions of the exercises in a text"
    if cell.cell_type == "code":
        return cell.source
    return "\n".join(SOLUTION.findall(cell.source)) if cell.cell_type == "markdown" else ""


class Notebook(pytest.File):
    "One notebook: a shell that lives while its cells run"

    def collect(self):
        from nbdev.config import get_config
        from nbdev.frontmatter import FrontmatterProc
        from nbdev.process import NBProcessor

        notebook = NBProcessor(self.path, procs=FrontmatterProc, process=True).nb
        if str(notebook.frontmatter_.get("skip_exec", "")).lower() == "true":
            return []
        left_out = set(get_config().tst_flags.split()) - set(self.config.getoption("--flags").split())
        self.items = []
        heading = ""
        for number, cell in enumerate(notebook.cells):
            if cell.cell_type == "markdown" and cell.source.startswith("#"):
                heading = cell.source.splitlines()[0].strip("# ")
            source = code_of(cell)
            if not source.strip() or "nbdev_export(" in source:
                continue
            if cell.directives_.get("eval:", [""])[0].lower() == "false":
                continue
            name = f"cell{number}[{heading}]" if heading else f"cell{number}"
            item = Cell.from_parent(self, name=name, source=source, number=number)
            flags = left_out & cell.directives_.keys()
            if flags:
                item.add_marker(pytest.mark.skip(reason=f"needs --flags {' '.join(sorted(flags))}"))
            item.runs = not flags
            self.items.append(item)
        return self.items

    def setup(self):
        import random

        import numpy as np
        import torch
        from execnb.shell import CaptureShell

        from lmnotes.nn import lm

        lm.archs()
        self.archs = dict(lm._ARCHS)  # A notebook's own classes must not outlive it
        self.failed = None
        self.before = dict(os.environ), os.getcwd(), list(sys.path), sys.modules["__main__"], torch.get_num_threads()
        os.environ["IN_TEST"] = "1"
        if self.path.relative_to(HERE).as_posix() in SHORTER:
            os.environ.update(SHORT)
        sys.path.insert(0, str(HERE))
        os.chdir(self.path.parent)
        self.shell = CaptureShell(self.path, timeout=CELL_SECONDS)
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)

    def teardown(self):
        import torch

        from lmnotes.nn import lm

        environ, folder, path, main, threads = self.before
        self.shell = None
        lm._ARCHS.clear()
        lm._ARCHS.update(self.archs)
        if "matplotlib.pyplot" in sys.modules:
            sys.modules["matplotlib.pyplot"].close("all")
        os.environ.clear()
        os.environ.update(environ)
        os.chdir(folder)
        sys.path[:] = path
        sys.modules["__main__"] = main
        torch.set_num_threads(threads)
        torch.set_default_dtype(torch.float32)
        if torch.are_deterministic_algorithms_enabled():
            torch.use_deterministic_algorithms(False)


class Cell(pytest.Item):
    "One code cell; the cells above it run first if they have not yet"

    def __init__(self, source, number, **kwargs):
        super().__init__(**kwargs)
        self.source = source
        self.number = number
        self.done = False

    def runtest(self):
        notebook = self.parent
        if notebook.failed is not None:
            pytest.skip(f"cell{notebook.failed} above it failed")
        for item in notebook.items[: notebook.items.index(self) + 1]:
            if item.done or not item.runs:
                continue
            item.done = True
            notebook.shell.run(item.source)
            if notebook.shell.exc:
                notebook.failed = item.number
                raise CellFailed(item, notebook.shell.exc)

    def repr_failure(self, excinfo, style=None):
        if not isinstance(excinfo.value, CellFailed):
            return super().repr_failure(excinfo, style)
        item, error = excinfo.value.args
        frames = traceback.extract_tb(error.__traceback__)
        in_cells = [frame for frame in frames if frame.filename.startswith("<ipython-input")]
        failing = error.lineno if isinstance(error, SyntaxError) else in_cells[0].lineno if in_cells else None
        report = [f"{self.path.name} cell {item.number}" + ("" if item is self else f" (run before {self.name})")]
        for number, line in enumerate(item.source.splitlines(), 1):
            report.append(f"{'>' if number == failing else ' '} {number:3} {line}")
        for frame in frames:
            machinery = any(part in frame.filename for part in ("/execnb/", "/IPython/", "/conftest.py"))
            if frame in in_cells[:1] or machinery:
                continue
            where = "a cell above" if frame in in_cells else os.path.relpath(frame.filename, HERE)
            report.append(f"  {where}:{frame.lineno} in {frame.name}: {frame.line}")
        message = "".join(traceback.format_exception_only(error)).rstrip()
        report.append("E " + "\nE ".join(message.splitlines()))
        return "\n".join(report)

    def reportinfo(self):
        return self.path, self.number, f"{self.path.name}::{self.name}"
