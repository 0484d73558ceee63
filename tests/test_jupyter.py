"""JupyterLab's stop button: the kernel and its whole process group get SIGINT while a training cell runs."""

import re
import time

from helpers import DEADLINE
from jupyter_client.manager import start_new_kernel

TRAIN = """
from lmnotes import run
r = run(
    run="stopped", out_dir={folder!r}, steps=100_000, log_every=10, eval_every=50_000, save_every=50_000,
    tokenizer="bytes", model_args="d_model=16 n_layers=1 n_heads=2", ctx_len=16, batch_size=4,
)
"""
AGAIN = "r = run(resume=True, out_dir={folder!r}, allow_change='steps', steps=r.step + 3)"
USE = "print(r.status, r.step > 10, len(r.generate('The ', 8)), (r.folder / 'interrupted').read_text().strip())"


def run_cell(client, code, seen=lambda text: None):
    "Run a cell to its end and return its output. `seen` is called with the output so far"
    request, text, end = client.execute(code), "", time.monotonic() + DEADLINE
    while time.monotonic() < end:
        message = client.get_iopub_msg(timeout=DEADLINE)
        if message["parent_header"].get("msg_id") != request:
            continue
        kind, content = message["msg_type"], message["content"]
        assert kind != "error", "\n".join(content["traceback"])
        text += content.get("text", "") if kind == "stream" else ""
        text += content.get("data", {}).get("text/plain", "")  # Redrawn output too
        seen(text)
        if kind == "status" and content["execution_state"] == "idle":
            return text
    raise TimeoutError(f"the cell is still running: {text[-300:]}")


def test_stop_button_saves_and_lets_the_next_cell_run(tmp_path):
    manager, client = start_new_kernel(startup_timeout=DEADLINE)
    pressed = []

    def press_when_training(text):
        if re.search(r"running at step [1-9]", text) and not pressed:
            pressed.append(manager.interrupt_kernel())

    try:
        text = run_cell(client, TRAIN.format(folder=str(tmp_path)), press_when_training)
        assert pressed and "interrupted at step" in text
        status, further, length, name = run_cell(client, USE).split()
        assert (status, further) == ("interrupted", "True") and int(length) > 0
        assert (tmp_path / "stopped" / name / "manifest.json").is_file()
        again = run_cell(client, AGAIN.format(folder=str(tmp_path)))
        assert "done at step" in again
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
