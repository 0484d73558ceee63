"""Small language models, written as notebooks. Names are loaded when they are first used, so that importing costs little."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # What type checkers and editors see
    from .data.datasets import get_corpus
    from .data.tokenizer_files import get_tokenizer, load_tokenizer
    from .data.tokens import open_tokens
    from .inference.evaluation import evaluate
    from .inference.generation import generate, stream
    from .nn.lm import archs, new_lm
    from .recipes.fresh_or_resume import from_env
    from .runs.folder import fork
    from .runs.load import load
    from .runs.monitor import attach
    from .runs.run import run

__version__ = "0.1.0"
__all__ = [
    "run",
    "load",
    "attach",
    "fork",
    "from_env",
    "generate",
    "stream",
    "evaluate",
    "new_lm",
    "archs",
    "get_corpus",
    "get_tokenizer",
    "load_tokenizer",
    "open_tokens",
]

_HOMES = dict(
    run="runs.run",
    load="runs.load",
    attach="runs.monitor",
    fork="runs.folder",
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


def __getattr__(name):
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(
            f"module 'lmnotes' has no attribute {name!r}; it has {', '.join(__all__)}, and chapters such as lmnotes.runs"
        )
    return getattr(import_module(f"lmnotes.{_HOMES[name]}"), name)


def __dir__():
    return sorted([*globals(), *__all__])
