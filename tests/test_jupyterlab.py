"""JupyterLab in a real browser, used as by a newcomer: open the training notebook, run all cells, watch, press stop."""

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager

from browser import chromium, open_browser, watch
from helpers import DEADLINE, ROOT, wait_until

# A small run that lasts until it is stopped, with frequent samples
LONG = dict(
    steps=1_000_000,
    tokenizer="bytes",
    model_args="d_model=16 n_layers=1 n_heads=2",
    ctx_len=32,
    batch_size=4,
    log_every=20,
    sample_every=100,
    eval_every=200,
    eval_batches=2,
    run="seen",
    prompt="The ",
)


def answers(port):
    "Return True if the server accepts requests"
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/api?token=abc")
    except OSError:
        return False
    return True


@contextmanager
def jupyterlab(workdir):
    "Start JupyterLab on loopback in a folder with the notebooks, and yield its address with the token"
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    (workdir / "nbs").mkdir()
    (workdir / "nbs" / "train.ipynb").write_bytes((ROOT / "nbs" / "train.ipynb").read_bytes())
    settings = {f"LMNOTES_{name.upper()}": str(value) for name, value in LONG.items()}
    environ = {name: value for name, value in os.environ.items() if not name.startswith("LMNOTES_")} | settings
    environ |= dict(
        LMNOTES_OUT_DIR=str(workdir / "runs"),
        JUPYTER_CONFIG_DIR=str(workdir / "config"),
        IPYTHONDIR=str(workdir / "ipython"),
    )
    environ.pop("PYTEST_CURRENT_TEST", None)  # If it is set, a kernel does not show its stderr
    environ |= dict(
        JUPYTER_RUNTIME_DIR=str(workdir / "runtime"),
        JUPYTER_DATA_DIR=str(workdir / "share"),
        JUPYTERLAB_WORKSPACES_DIR=str(workdir / "w"),
    )
    command = f"-m jupyter lab --allow-root --no-browser --ip=127.0.0.1 --port={port} --ServerApp.port_retries=0 --IdentityProvider.token=abc"
    with open(workdir / "server.log", "w") as log:
        server = subprocess.Popen([sys.executable, *command.split()], cwd=workdir, env=environ, stdout=log, stderr=log)
        try:
            wait_until(lambda: server.poll() is not None or answers(port))
            assert server.poll() is None, (workdir / "server.log").read_text()
            yield f"http://127.0.0.1:{port}/lab/tree/nbs/train.ipynb?token=abc"
        finally:
            server.terminate()
            server.wait()


def until(page, condition):
    "Check a condition repeatedly while the page works"
    end = time.monotonic() + DEADLINE
    while not (found := condition()):
        assert time.monotonic() < end, "what was waited for did not happen"
        page.wait_for_timeout(100)
    return found


def kernel(address):
    "Return the state of the notebook's kernel as reported by the server: starting, idle, busy"
    base, token = address.split("/lab")[0], address.split("token=")[1]
    sessions = json.load(urllib.request.urlopen(f"{base}/api/sessions?token={token}"))
    return sessions[0]["kernel"]["execution_state"] if sessions else "starting"


def test_train_watch_and_stop_in_jupyterlab(tmp_path):
    chromium()
    with jupyterlab(tmp_path) as address, open_browser(viewport=dict(width=1400, height=1000)) as browser:
        page = browser.new_page()
        errors, outside = watch(page, address.split("/lab")[0])
        page.goto(address)
        page.wait_for_selector(".jp-Notebook .jp-CodeCell")
        until(page, lambda: kernel(address) == "idle")
        page.locator(".lm-MenuBar-item", has_text="Run").click()
        page.locator(".lm-Menu-itemLabel", has_text=re.compile("^Run All Cells$")).click()
        cell = page.locator(".jp-CodeCell", has_text="lmnotes.run(")
        images = cell.locator(".jp-OutputArea-output img")
        pictures = set()

        def drawn():
            cell.scroll_into_view_if_needed()
            if images.count():
                pictures.add(images.first.get_attribute("src"))
            return len(pictures) > 3

        until(page, drawn)
        assert cell.locator(".jp-OutputArea-child").count() == 2  # A line, and under it the figure
        line = cell.locator(".jp-OutputArea-output").first
        earlier = line.inner_text()
        assert re.fullmatch(r"step [\d,]+ of 1,000,000 \| \d+\w+ left", earlier.strip())
        until(page, lambda: line.inner_text() != earlier)
        images.first.click(button="right")
        page.locator(".lm-Menu-itemLabel", has_text="Create New View for Cell Output").click()
        beside = page.locator(".jp-LinkedOutputView")
        until(page, lambda: beside.count() and beside.locator("img").count() and earlier not in beside.inner_text())
        before = beside.locator("img").first.get_attribute("src")
        until(page, lambda: beside.locator("img").first.get_attribute("src") != before)
        samples = tmp_path / "runs" / "seen" / "samples.jsonl"
        until(page, lambda: samples.exists() and len(samples.read_text().splitlines()) > 2)
        page.screenshot(path=tmp_path / "running.png")
        page.locator("[data-command='notebook:interrupt-kernel']").click()
        record = tmp_path / "runs" / "seen" / "run.json"
        until(page, lambda: json.loads(record.read_text())["status"] == "interrupted")
        notebook = tmp_path / "nbs" / "train.ipynb"

        def code_cells():
            return [c for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == "code"]

        def all_have_run():
            page.keyboard.press("Control+s")
            page.wait_for_timeout(1000)
            return all(c["execution_count"] for c in code_cells())

        until(page, all_have_run)
        page.screenshot(path=tmp_path / "stopped.png")
    cells = code_cells()
    (training,) = [c for c in cells if "lmnotes.run(" in "".join(c["source"])]
    line, output = training["outputs"]  # Regardless of the number of updates
    assert re.fullmatch(r"step [\d,]+ of 1,000,000", "".join(line["data"]["text/plain"]))
    text = "".join(output["data"]["text/plain"])
    assert output["data"]["image/png"] and "interrupted at step" in text
    assert len(re.findall(r"step [\d,]+ \| 'The ", text)) >= 3  # Samples of the same prompt
    for cell in cells[
        3:
    ]:  # After the installing cell, imports and parameters: those before the training, the training, and those after it
        assert cell["outputs"], cell["source"]
    kinds = {kind for c in cells for o in c["outputs"] for kind in o.get("data", {})}
    assert not any("widget" in kind for kind in kinds)
    assert all("text/plain" in o["data"] for c in cells for o in c["outputs"] if "data" in o)  # Readable anywhere
    assert (tmp_path / "runs" / "seen" / "interrupted").exists()
    assert not outside, outside
    assert not [e for e in errors if "404" not in e], errors
