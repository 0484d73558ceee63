"""A wheel built from this folder holds the whole library and works away from it."""

import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def copy_project(source):
    "Copy what an installation needs, so that no build folder here is used or left behind"
    for name in ("settings.ini", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "lmnotes", source / "lmnotes", ignore=shutil.ignore_patterns("__pycache__"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "Build a wheel from a copy of the project"
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    copy_project(source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(target), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = target.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def settings():
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def test_metadata(wheel, settings):
    assert wheel.name == f"lmnotes-{settings['version']}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        info = f"lmnotes-{settings['version']}.dist-info"
        metadata = archive.read(f"{info}/METADATA").decode()
        entries = archive.read(f"{info}/entry_points.txt").decode()
        assert any(name.startswith(info) and name.endswith("LICENSE") for name in archive.namelist())
    assert f"Version: {settings['version']}" in metadata
    assert f"Requires-Python: >={settings['min_python']}" in metadata
    assert "Requires-Dist: torch>=" in metadata
    assert "fastcore" not in "".join(
        line for line in metadata.splitlines() if "Requires-Dist" in line and "extra" not in line
    )
    assert "lmnotes = lmnotes.apps.cli:main" in entries
    assert "lmnotes = lmnotes.apps.papermill_engine:GracefulEngine" in entries


def test_every_module_is_inside(wheel):
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if name.startswith("lmnotes/")}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "lmnotes").rglob("*.py")}
    assert inside == modules | {"lmnotes/py.typed"}


def test_it_works_elsewhere(wheel, tmp_path, settings):
    "The package works if it is installed in a separate folder, first on the path, and run from another one"
    target, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(command, check=True, capture_output=True)
    code = f"""
import importlib, pkgutil, sys
sys.path.insert(0, {str(target)!r})
import lmnotes
assert lmnotes.__file__.startswith({str(target)!r}), lmnotes.__file__
assert lmnotes.__version__ == {settings["version"]!r}
names = [m.name for m in pkgutil.walk_packages(lmnotes.__path__, "lmnotes.") if not m.name.endswith("__main__")]
for name in names:
    importlib.import_module(name)
from lmnotes.apps.cli import main  # the entry points exist
from lmnotes.apps.papermill_engine import GracefulEngine
from lmnotes.nn.lm import new_lm
print(new_lm("gpt", vocab_size=11, ctx_len=8, d_model=32, n_layers=1, n_heads=2).cfg.vocab_size, len(names))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=elsewhere, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "11"


def test_an_editable_install_works_in_the_folder_above_the_clone(tmp_path):
    "There, Python sees the clone as a package without modules, which an installed package must hide"
    clone, site = tmp_path / "lmnotes", tmp_path / "site"
    for folder in (clone, site):
        folder.mkdir()
    copy_project(clone)
    code = f"from setuptools.build_meta import build_editable; print(build_editable({str(site)!r}))"
    built = subprocess.run([sys.executable, "-c", code], cwd=clone, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    shutil.unpack_archive(site / built.stdout.split()[-1], site, "zip")
    code = f"import site; site.addsitedir({str(site)!r}); import lmnotes; print(lmnotes.__file__)"
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=tmp_path, env={}, capture_output=True, text=True)
    assert done.stdout.strip() == str(clone / "lmnotes/__init__.py"), done.stderr
