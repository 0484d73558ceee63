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
    run="runs",
    load="runs",
    attach="view",
    fork="runs",
    from_env="runs",
    generate="generation",
    stream="generation",
    evaluate="evaluation",
    new_lm="lm",
    archs="lm",
    get_corpus="corpus",
    get_tokenizer="tokenizer",
    load_tokenizer="tokenizer",
    open_tokens="tokens",
)


def __getattr__(name):
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(
            f"module 'lmnotes' has no attribute {name!r}; it has {', '.join(__all__)}, and modules such as lmnotes.runs"
        )
    return getattr(import_module(f"lmnotes.{_HOMES[name]}"), name)


def __dir__():
    return sorted([*globals(), *__all__])
