"""Small language models, written as notebooks. Each name loads its module on first use, so that the import is fast."""

import os as _os
import sys as _sys
import time as _time
from pathlib import Path as _Path
from typing import TYPE_CHECKING

# Threads of torch that wait for each other keep their cores busy. If other programs need the cores, let them sleep instead.
# OpenMP reads this variable when torch is loaded. The file holds the number of running threads, this one included. Programs
# that have just been started run for a moment only, so we look again
if "torch" not in _sys.modules and "OMP_WAIT_POLICY" not in _os.environ:
    _looks = 0
    try:
        while (
            _looks < 5
            and int(_Path("/proc/loadavg").read_text().split()[3].partition("/")[0]) > 1 + (_os.cpu_count() or 1) / 2
        ):
            _looks += 1
            _time.sleep(0.02)
    except (OSError, ValueError, IndexError):  # Not on this system
        _looks = 0
    if _looks == 5:
        _os.environ["OMP_WAIT_POLICY"] = "passive"

if TYPE_CHECKING:  # For type checkers and editors (`as` makes a name public)
    from .apps.doctor import doctor as doctor
    from .data.datasets import get_corpus as get_corpus
    from .data.tokenizer_files import get_tokenizer as get_tokenizer, load_tokenizer as load_tokenizer
    from .data.tokens import open_tokens as open_tokens
    from .inference.evaluation import evaluate as evaluate
    from .inference.generation import generate as generate, stream as stream
    from .inspect.diff import diff as diff
    from .inspect.verify import verify as verify
    from .nn.lm import archs as archs, new_lm as new_lm
    from .recipes.fresh_or_resume import from_env as from_env
    from .runs.folder import fork as fork
    from .runs.load import load as load
    from .runs.monitor import attach as attach
    from .runs.run import run as run

__version__ = "0.1.0"
_HOMES = dict(
    run="runs.run",
    load="runs.load",
    attach="runs.monitor",
    fork="runs.folder",
    verify="inspect.verify",
    diff="inspect.diff",
    doctor="apps.doctor",
    from_env="recipes.fresh_or_resume",
    generate="inference.generation",
    stream="inference.generation",
    evaluate="inference.evaluation",
    new_lm="nn.lm",
    archs="nn.lm",
    get_corpus="data.datasets",
    get_tokenizer="data.tokenizer_files",
    load_tokenizer="data.tokenizer_files",
    open_tokens="data.tokens",
)
__all__ = list(_HOMES)


def __getattr__(name):
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(
            f"module 'lmnotes' has no attribute {name!r}; it has {', '.join(__all__)}, and chapters such as lmnotes.runs"
        )
    return getattr(import_module(f"lmnotes.{_HOMES[name]}"), name)


def __dir__():
    return sorted([*globals(), *__all__])
