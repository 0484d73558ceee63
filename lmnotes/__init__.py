"""Small language models, written as notebooks. Names are loaded when they are first used, so that importing costs little."""

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
