"""Package setup. All settings are in settings.ini: edit them there."""

import shlex
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(here / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    author=cfg["author"],
    author_email=cfg["author_email"],
    keywords=cfg["keywords"],
    url=cfg["git_url"],
    license="Apache-2.0",
    # An editable install is then a path, which hides the folder `lmnotes` of a clone from Python in the folder above it
    package_dir={"": "."},
    packages=find_packages(include=["lmnotes", "lmnotes.*"]),
    include_package_data=True,
    package_data={cfg["lib_path"]: ["py.typed"]},
    python_requires=">=" + cfg["min_python"],
    install_requires=shlex.split(cfg["requirements"]),
    extras_require={o: shlex.split(cfg[f"{o}_requirements"]) for o in ("lab", "play", "store", "data", "dev")},
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    entry_points={
        "console_scripts": shlex.split(cfg["console_scripts"]),
        "papermill.engine": shlex.split(cfg["papermill_engines"]),
        "nbdev": [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],
    },
    zip_safe=False,
)
