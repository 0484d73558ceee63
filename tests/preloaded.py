"""What each process of the tests would import and prepare: the server of `helpers.py` does it once, and forks the processes."""

import os
from importlib import import_module
from pathlib import Path

from lmnotes.parameters import check_declared
from lmnotes.runs.config import RunConfig

CHAPTERS = "models", "inspect", "recipes"  # Their modules are imported when they are first used
PACKAGE = Path(__file__).parent.parent / "lmnotes"
OTHERS = """lmnotes.apps.cli lmnotes.export.hub filelock matplotlib.backends.backend_agg matplotlib.pyplot nbformat numpy.ctypeslib
    pytest safetensors.torch tokenizers torch.utils.serialization.config transformers.models.gpt2.modeling_gpt2 tyro yaml"""
# Without the folder that `fork_process` adds
os.environ["PYTHONPATH"] = os.environ["PYTHONPATH"].partition(os.pathsep)[2]

for name in [f"lmnotes.{c}.{path.stem}" for c in CHAPTERS for path in PACKAGE.glob(f"{c}/[a-z]*.py")] + OTHERS.split():
    import_module(name)
check_declared(RunConfig())  # Prepares the checks of all parameters
