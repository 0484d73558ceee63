"""An exported model works without this library, reveals nothing about this machine, and is uploaded unchanged."""

import base64
import hashlib
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from helpers import (
    DEADLINE,
    ROOT,
    TINY,
    lmnotes_command,
    read_log,
    replacing_environment,
    run_code_alone,
    run_in_process,
    write_corpus,
)
from safetensors.torch import load_file

import lmnotes
from lmnotes import files
from lmnotes.core import CheckpointError, sha256_file
from lmnotes.export import export as module
from lmnotes.export.export import export, read_manifest, source_files
from lmnotes.export.hub import upload
from lmnotes.export.model_card import retrain_command
from lmnotes.nn.lm import LM, new_lm
from lmnotes.nn.lora import merge_and_unload
from lmnotes.runs.load import load
from lmnotes.runs.run import run
from lmnotes.training.weights import load_initial_weights, merged_state_dict

TOKEN = "hf_" + "sEcReT0123" * 3
SMALL = TINY | dict(steps=20, eval_every=5, save_every=5, keep="all", prompt="3: ", eval_batches=1)
SHAPE = "d_model=16 n_layers=1 n_heads=2"
NANOTHINK = (
    "transformer=gpt,d_model=16,n_layers=1,n_heads=2 state_space=ssm,d_model=16,n_layers=1,head_dim=8 "
    "diffuser= d_model=16 n_heads=2 head_dim=8 kv_latent_dim=8 rope_dim=4"
)


def trained(folder, **params):
    "Return a tiny run, whose text, tokenizer and runs are all inside `folder`"
    if not (folder / "corpus").exists():
        write_corpus(folder / "corpus")
    return run(**SMALL | dict(data=str(folder / "corpus"), out_dir=str(folder / "runs")) | params)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return tmp_path_factory.mktemp("private-folder")


@pytest.fixture(scope="module")
def r(workdir):
    return trained(workdir)


@pytest.fixture(scope="module")
def exported(r, workdir):
    return export(r, workdir / "exported", state_dict="best_model.pth")


# The folder works on its own

ALONE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import generate, torch
from lmnotes.inference.generation import generate as write
lm, tokenizer, about = generate.load()
with torch.no_grad():
    torch.save(lm(torch.arange(12)[None] * 3 % lm.cfg.vocab_size), sys.argv[2])
Path("text").write_text(write(lm, tokenizer, "3: ", 30, temperature=0), encoding="utf-8")
ours = [Path(m.__file__) for name, m in sys.modules.items() if name.split(".")[0] == "lmnotes"]
strange = [p for p in ours if Path(sys.argv[1]) not in p.parents]
assert len(ours) > 5 and not strange, strange
"""


def run_exported(folder, tmp_path):
    "Return (logits, greedy text) of a copy of an exported folder, in a process that imports no other lmnotes"
    copy = tmp_path / "elsewhere"
    shutil.copytree(folder, copy)
    code = run_in_process(tmp_path, run_code_alone, ALONE, copy, tmp_path / "logits.pt")
    assert code == 0, read_log(tmp_path)[-3000:]
    return torch.load(tmp_path / "logits.pt", weights_only=True), (tmp_path / "text").read_text(encoding="utf-8")


@torch.no_grad()
def local_logits(r, lm=None):
    "Return (logits, greedy text) of a run"
    lm = (lm or r.lm).eval()
    return lm(torch.arange(12)[None] * 3 % lm.cfg.vocab_size), r.generate("3: ", 30, temperature=0)


def test_exported_model_gives_the_same_logits_and_text(r, exported, tmp_path):
    logits, text = run_exported(exported, tmp_path)
    assert torch.equal(logits, local_logits(r)[0]) and text == local_logits(r)[1] and text


@pytest.mark.parametrize(
    "params",
    [
        dict(arch="rnn", model_args="d_model=16 n_layers=1"),
        dict(arch="gpt2", model_args=SHAPE + " n_positions=16", init_from="random"),
        dict(arch="bytepatch", model_args=SHAPE + " d_byte=16 ngram_rows=64"),
        dict(arch="bytepatch", model_args=SHAPE + " d_byte=16 mixer=hybrid byte_path=gru", run="guide"),
        dict(arch="streams", model_args=SHAPE + " inputs=internal_voice,touch"),
        dict(arch="ssm", model_args="d_model=16 n_layers=1 head_dim=8"),
        dict(arch="diffusion", model_args=SHAPE, run="masked"),
        dict(arch="diffusion", model_args=SHAPE + " objective=mse block=1"),
        dict(arch="nanothink", model_args=NANOTHINK),
        dict(tokenizer="bpe:300", model_args=SHAPE + " tie=True"),
        dict(tokenizer="chars", preset="nanogpt", model_args=SHAPE),
    ],
    ids=[
        "rnn",
        "gpt2",
        "bytepatch",
        "agiformer",
        "streams",
        "ssm",
        "masked",
        "diffuser",
        "nanothink",
        "bpe and tied",
        "chars",
    ],
)
def test_other_models_and_tokenizers(params, workdir, tmp_path):
    name = params.get("arch", params.get("tokenizer", "gpt").partition(":")[0])
    r = trained(workdir, **dict(run=name, steps=5) | params)
    folder = export(r, tmp_path / name)
    logits, text = run_exported(folder, tmp_path)
    torch.testing.assert_close(logits, local_logits(r)[0], atol=1e-6, rtol=1e-5)
    assert text == local_logits(r)[1]
    models = {type(m).__module__.rpartition(".")[2] for m in r.lm.modules() if isinstance(m, LM)}
    assert {p.stem for p in (folder / "lmnotes/models").glob("*.py")} == models | {"__init__"}
    packages = re.search(r"pip install (.*)", (folder / "README.md").read_text())[1].split()
    assert ("transformers" in packages) == (name == "gpt2") and ({"tokenizers", "tiktoken"} <= {*packages}) == (
        name == "bpe"
    )


def test_adapters_become_part_of_the_weights(r, workdir, tmp_path):
    a = trained(workdir, run="adapted", init_from=str(r.folder), lora_rank=2, lr=0.01, optimizer="adamw", steps=10)
    assert not torch.equal(local_logits(a)[0], local_logits(r)[0])
    folder = export(a, tmp_path / "adapted")
    logits, _ = run_exported(folder, tmp_path)
    assert torch.equal(logits, local_logits(a, merge_and_unload(a.lm))[0])
    assert not [name for name in load_file(folder / "model.safetensors") if "lora" in name]
    assert "rank 2, merged into r" in (folder / "README.md").read_text()


THINKING = """
import sys
sys.path.insert(0, sys.argv[1])
import generate, torch
lm, _, _ = generate.load(model_args="thinking_steps=5")
with torch.no_grad():
    torch.save(lm(torch.arange(12)[None]), sys.argv[2])
"""


def test_thinking_steps_can_be_raised(workdir, tmp_path):
    r = trained(workdir, run="thinker", arch="bytepatch", model_args=SHAPE + " d_byte=16 ngram_rows=64", steps=5)
    folder = export(r, tmp_path / "thinker")
    assert run_in_process(tmp_path, run_code_alone, THINKING, folder, tmp_path / "logits.pt") == 0, read_log(tmp_path)
    with torch.no_grad():
        three = r.lm.eval()(torch.arange(12)[None])
        r.lm.cfg.thinking_steps = 5
        five = r.lm(torch.arange(12)[None])
    logits = torch.load(tmp_path / "logits.pt", weights_only=True)
    torch.testing.assert_close(logits, five, atol=1e-6, rtol=1e-5)
    assert not torch.equal(five, three)


def test_the_plain_weights_are_those_of_the_model(r, exported):
    weights = torch.load(exported / "best_model.pth", weights_only=True)
    assert weights.keys() == r.lm.state_dict().keys()
    assert all(torch.equal(t, r.lm.state_dict()[name]) for name, t in weights.items())


def test_exported_script_generates_and_leaves_no_files(exported, tmp_path, capsys):
    copy = shutil.copytree(exported, tmp_path / "copy")
    command = [sys.executable, str(copy / "generate.py"), "3: ", "--n", "20", "--top-k", "5"]
    env = {n: v for n, v in os.environ.items() if n != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(command, capture_output=True, env=env, encoding="utf-8", timeout=DEADLINE)
    assert done.returncode == 0 and done.stdout.startswith("3: "), done.stderr
    assert list(copy.rglob("*.pyc"))  # Compiled files contain paths of this machine
    assert upload(copy, "me/x", dry_run=True).keys() == {*read_manifest(copy), "manifest.json"}
    assert "not part of the export" not in capsys.readouterr().out


# Content of the files


def test_no_file_contains_local_paths(exported, workdir):
    words = [
        str(workdir),
        "private-folder",
        str(Path.home()) + "/",
        str(Path(sys.prefix)),
        str(Path(lmnotes.__file__).parent),
    ]
    for path in exported.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            told = [w for w in words if w.encode() in data]
            assert not told, f"{path.name} contains {told}"


def test_model_card(r, exported):
    import yaml
    from huggingface_hub import ModelCard

    text = (exported / "README.md").read_text()
    (figure,) = ModelCard(text).data.eval_results  # Parsed as on the hub
    assert (figure.metric_type, figure.dataset_name) == ("bits_per_byte", "corpus")
    head = yaml.safe_load(text.split("---\n")[1])
    last = r.result["last"]
    metric = head["model-index"][0]["results"][0]["metrics"][0]
    assert metric["value"] == pytest.approx(last["bpb"], rel=1e-6)
    assert head["pipeline_tag"] == "text-generation" and set(head["tags"]) == {"lmnotes", "gpt"}
    for figure in (f"{last['loss']:.4f} ± {last['stderr']:.4f}", f"{last['bpb']:.4f} ± {last['bpb_stderr']:.4f}"):
        assert figure in text
    assert f"{r.info['n_params']:,}" in text and "whole validation split" in text and retrain_command(r.info) in text
    assert (exported / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_model_card_command_trains_the_same_model(r, exported, workdir):
    command = re.search(r"^lmnotes train .*$", (exported / "README.md").read_text(), re.M)[0]
    again = shlex.split(command)[1:] + ["--data", str(workdir / "corpus"), "--out-dir", str(workdir / "again")]
    assert "--data corpus" in command
    assert lmnotes_command(*again, "--device", "cpu") == 0
    new = load(workdir / "again" / "r")
    assert all(torch.equal(a, b) for a, b in zip(new.lm.parameters(), r.lm.parameters()))


def test_model_card_names_byte_data(workdir, tmp_path):
    (workdir / "raw.dat").write_bytes(bytes(range(256)) * 20)
    r = trained(workdir, run="raw", data=f"bytes:{workdir / 'raw.dat'}", steps=5)
    folder = export(r, tmp_path / "raw")
    assert "--data bytes:raw.dat" in (folder / "README.md").read_text()
    assert not [p for p in folder.rglob("*.*") if p.is_file() and str(workdir).encode() in p.read_bytes()]


def test_export_of_an_older_step(workdir, tmp_path):
    r = trained(workdir, run="worse", lr=0.3, optimizer="adamw", schedule="constant", seed=1, steps=35)
    best = load(r.folder, "best")
    assert best.step < r.step, "this run was to get worse"
    folder = export(r, tmp_path / "best", which="best")
    config = json.loads((folder / "config.json").read_text())
    assert config["step"] == best.step == json.loads((folder / "run.json").read_text())["step"]
    weights = load_file(folder / "model.safetensors")
    assert all(torch.equal(t, best.lm.state_dict()[name]) for name, t in weights.items())
    text = (folder / "README.md").read_text()
    assert f"{r.result['best']:.4f}" in text and "first batches of the validation split" in text


# The folder


def test_nonempty_folder_is_rejected(r, exported, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("x")
    with pytest.raises(ValueError, match="is not empty and not an exported model. Choose a new folder"):
        export(r, tmp_path / "mine")
    with pytest.raises(ValueError, match="is a file"):
        export(r, tmp_path / "mine/notes.txt")
    copy = shutil.copytree(exported, tmp_path / "copy")
    (copy / "more\x1b.txt").write_text("x")
    with pytest.raises(ValueError, match="more⟨U\\+001B⟩.txt changed since the export. Move these files"):
        export(r, copy)
    (copy / "more\x1b.txt").unlink()
    (copy / "config.json").unlink()
    with pytest.raises(ValueError, match="config.json changed"):
        export(r, copy)
    assert (tmp_path / "mine/notes.txt").read_text() == "x"


def test_an_earlier_export_is_replaced_by_the_same_bytes(r, exported, tmp_path):
    (tmp_path / "empty").mkdir()
    folder = export(r, tmp_path / "empty", state_dict="best_model.pth")
    assert read_manifest(folder) == read_manifest(exported)
    assert "best_model.pth" not in read_manifest(export(r, folder))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty"]


def test_failed_export_changes_no_files(r, tmp_path, monkeypatch):
    folder = export(r, tmp_path / "model")
    before = read_manifest(folder)

    def fails(*args):
        raise OSError("no space left on device")

    for name in ("model_card", "replace_folder", "fsync_path"):
        with monkeypatch.context() as patched:
            patched.setattr(module, name, fails)
            for target in (folder, tmp_path / "new"):
                with pytest.raises(OSError, match="no space"):
                    export(r, target)
        if name != "fsync_path":
            assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]
        assert read_manifest(folder) == before


def test_failed_rename_keeps_the_earlier_export(r, tmp_path, monkeypatch):
    folder = export(r, tmp_path / "model")
    before = read_manifest(folder)

    def exchange_paths(a, b):
        raise OSError("it is in use")

    monkeypatch.setattr(files, "exchange_paths", exchange_paths)
    with pytest.raises(OSError, match="in use"):
        export(r, folder, state_dict="best_model.pth")
    assert read_manifest(folder) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_unexportable_models_are_rejected(r, workdir, tmp_path):
    for name in ("../best.pth", "model.safetensors", "README.md", "manifest.json", "..", "lmnotes", ".pth", "a/b.pt"):
        with pytest.raises(ValueError, match="is not the name of a .pt or .pth file, such as best_model.pth"):
            export(r, tmp_path / "x", state_dict=name)
    with pytest.raises(ValueError, match="there is no run here to load"):
        export(workdir / "nothing", tmp_path / "x")
    dry = trained(workdir, run="dry", dry_run=True)
    with pytest.raises(ValueError, match="a dry run saves nothing"):
        export(dry, tmp_path / "x")
    broken = load(r.folder)
    next(broken.lm.parameters()).data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        export(broken, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_imports_inside_functions_are_exported():
    names = {p.relative_to(module._ROOT).as_posix() for p in source_files("lmnotes.nn.lm")}
    assert "lmnotes/models/__init__.py" in names  # Calling `archs` imports it
    assert "lmnotes/nn/lm.py" in names and not any(name.startswith("lmnotes/runs/") for name in names)


def test_commands(r, tmp_path, capsys):
    to = tmp_path / "model"
    words = "export", "--run", r.folder, "--to", to, "--which", "best", "--state-dict", "best_model.pth"
    assert lmnotes_command(*words) == 0 and (to / "best_model.pth").exists()
    assert lmnotes_command("upload", "--folder", to, "--repo", "me/model", "--dry-run") == 0
    assert "would go to me/model" in capsys.readouterr().out
    assert lmnotes_command("upload", "--folder", to, "--repo", "model", "--dry-run") == 2
    assert lmnotes_command("export", "--run", r.folder, "--to", tmp_path) == 2
    assert "is not empty and not an exported model" in capsys.readouterr().err


# A hub


class Hub(BaseHTTPRequestHandler):
    "Minimal hub that creates repositories and accepts commits. The repository name selects the error"

    protocol_version = "HTTP/1.1"

    def handle_any(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.asked.append((self.command, self.path, dict(self.headers), body))
        status, answer = self.answer(body)
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_POST = do_PUT = do_GET = do_HEAD = handle_any

    def answer(self, body):
        address, path = f"http://127.0.0.1:{self.server.server_address[1]}", self.path.split("?")[0]
        if path.startswith("/storage/"):
            if self.server.storage_fails:
                return 403, {}
            self.server.stored[path.removeprefix("/storage/")] = body
            return 200, {}
        if path == "/verify":
            return 200, {}
        if path == "/api/validate-yaml":
            return 200, dict(errors=[], warnings=[])
        if path == "/api/repos/create":
            name = json.loads(body)["name"]
            wrong = dict(unauthorized=401, forbidden=403, missing=404, teapot=418).get(name)
            if wrong:
                return wrong, dict(error=f"what the hub says of {self.headers['Authorization']}")
            return 200, dict(url=f"{address}/me/{name}")
        if "/preupload/" in path:
            files = [dict(path=f["path"], shouldIgnore=False) for f in json.loads(body)["files"]]
            large = (".safetensors", ".pth", ".png")
            modes = [dict(f, uploadMode="lfs" if f["path"].endswith(large) else "regular") for f in files]
            return 200, dict(files=modes)
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for o in objects:
                o["actions"] = dict(
                    upload=dict(href=f"{address}/storage/{o['oid']}"), verify=dict(href=f"{address}/verify")
                )
            return 200, dict(transfer="basic", objects=objects)
        if "/commit/" in path:
            self.server.commits.append([json.loads(line) for line in body.decode().splitlines()])
            return 200, dict(success=True, commitUrl=f"{address}/me/ok/commit/{'0' * 40}", commitOid="0" * 40)
        return 404, dict(error="no such page")

    def log_message(self, *args):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked, server.stored, server.commits, server.storage_fails = [], {}, [], False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


UPLOAD = """
import sys
from lmnotes.export.hub import upload
for repo in sys.argv[2:]:
    try:
        print(sorted(upload(sys.argv[1], repo)))
    except ValueError as error:
        print(f"{type(error).__name__}: {error}")
"""


LIBRARIES = "lmnotes", "huggingface_hub"  # The second reads the variables when it is imported


def uploading(folder, home, *repos, port=9, **environment):
    "Return the output of a new process that uploads a folder to several repositories"
    clean = {n: v for n, v in os.environ.items() if not n.startswith(("HF_", "HUGGING", "TRANSFORMERS_", "LMNOTES_"))}
    clean = {n: v for n, v in clean.items() if not n.lower().endswith("_proxy")}
    clean |= dict(HF_HOME=str(home), HF_HUB_DISABLE_TELEMETRY="1", HF_HUB_DISABLE_XET="1", NO_PROXY="127.0.0.1")
    clean |= dict(HF_ENDPOINT=f"http://127.0.0.1:{port}")
    code = run_in_process(
        home, replacing_environment, clean | environment, run_code_alone, UPLOAD, folder, *repos, packages=LIBRARIES
    )
    assert code == 0, read_log(home)[-3000:]
    assert TOKEN not in read_log(home)
    output = read_log(home)
    (home / "log").unlink()
    return output


def received(hub):
    "Return {name: bytes} of the hub's last commit"
    files = {}
    for line in hub.commits[-1]:
        value = line["value"]
        if line["key"] == "file":
            assert value["encoding"] == "base64"
            files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            data = hub.stored[value["oid"]]
            assert hashlib.sha256(data).hexdigest() == value["oid"] and len(data) == value["size"]
            files[value["path"]] = data
    return files


def test_uploaded_files_equal_exported_files(hub, exported, tmp_path):
    output = uploading(exported, tmp_path, "me/ok", port=hub.server_address[1], HF_TOKEN=TOKEN)
    files = {p.relative_to(exported).as_posix(): p.read_bytes() for p in exported.rglob("*") if p.is_file()}
    assert received(hub) == files
    assert {"best_model.pth", "README.md", "generate.py", "lmnotes/models/gpt.py"} <= files.keys()
    assert str(sorted(files)) in output and "/me/ok/commit/" in output
    header = hub.commits[-1][0]
    assert header["key"] == "header" and header["value"]["summary"] == "exported, step 20"
    create = next(json.loads(body) for _, path, _, body in hub.asked if path == "/api/repos/create")
    assert (create["name"], create["organization"]) == ("ok", "me")
    assert create.get("private") is True or create.get("visibility") == "private"


def test_token_appears_only_in_its_header(hub, exported, tmp_path):
    uploading(exported, tmp_path, "me/ok", port=hub.server_address[1], HF_TOKEN=TOKEN)
    assert len(hub.asked) > 5
    for method, path, headers, body in hub.asked:
        where = [name for name, value in headers.items() if TOKEN in value]
        assert TOKEN not in path and TOKEN.encode() not in body
        if path.startswith("/storage/"):  # The real hub stores files on another company's machine
            assert where == [], f"{method} {path} has the token in {where}"
        elif path != "/api/validate-yaml":
            assert where == ["authorization"] or where == ["Authorization"], f"{method} {path}: {where}"
    written = [p for p in tmp_path.rglob("*") if p.is_file() and TOKEN.encode() in p.read_bytes()]
    assert written == []


def test_token_from_a_login(hub, exported, tmp_path):
    (tmp_path / "token").write_text(TOKEN)
    output = uploading(exported, tmp_path, "me/ok", port=hub.server_address[1])
    assert "/me/ok/commit/" in output and received(hub)


def test_no_request_without_a_token(hub, exported, tmp_path):
    output = uploading(exported, tmp_path, "me/ok", port=hub.server_address[1])
    for part in ("UploadError", "Set HF_TOKEN", "hf auth login"):
        assert part in output
    assert hub.asked == []


def test_hub_errors_are_explained(hub, exported, tmp_path):
    repos = ["me/unauthorized", "me/forbidden", "me/missing", "me/teapot"]
    output = uploading(exported, tmp_path, *repos, port=hub.server_address[1], HF_TOKEN=TOKEN).splitlines()
    assert [line.split(":")[0] for line in output] == ["UploadError"] * 4
    for line, words in zip(output, ["does not know the token", "may not write there", "no such owner", "418"]):
        assert words in line
    assert hub.commits == []


def test_failed_upload_of_a_large_file(hub, exported, tmp_path):
    hub.storage_fails = True
    output = uploading(exported, tmp_path, "me/ok", port=hub.server_address[1], HF_TOKEN=TOKEN)
    assert "UploadError: me/ok: Error while uploading" in output and "the answer was 403" in output
    assert hub.commits == []


def test_no_network(exported, tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    output = uploading(exported, tmp_path, "me/ok", port=port, HF_TOKEN=TOKEN)
    assert "UploadError: me/ok: not uploaded: the hub cannot be reached" in output
    output = uploading(exported, tmp_path, "me/ok", HF_TOKEN=TOKEN, HF_HUB_OFFLINE="1")
    assert "the hub cannot be reached (OfflineModeIsEnabled: " in output


def test_a_dry_run_needs_no_token_and_no_network(exported, monkeypatch, capsys):
    monkeypatch.setattr(socket.socket, "connect", lambda *args: pytest.fail("a dry run connects to something"))
    sizes = upload(exported, "me/ok", dry_run=True)
    assert sizes["model.safetensors"] == (exported / "model.safetensors").stat().st_size
    output = capsys.readouterr().out
    assert "model.safetensors" in output and "Nothing has been sent" in output
    for repo in ("ok", "me/", "a/b/c", "me/o k", "../me"):
        with pytest.raises(ValueError, match="not of the form owner/name"):
            upload(exported, repo, dry_run=True)


def test_secrets_and_damaged_files_are_not_uploaded(exported, tmp_path, capsys):
    copy = shutil.copytree(exported, tmp_path / "copy")
    with open(copy / "README.md", "a") as f:
        f.write("\nmore words\n")
    upload(copy, "me/ok", dry_run=True)  # A README may be edited
    (copy / ".env").write_text(f"HF_TOKEN={TOKEN}")
    assert ".env" not in upload(copy, "me/ok", dry_run=True)
    assert "not uploaded: .env" in capsys.readouterr().out
    with open(copy / "README.md", "a") as f:
        f.write(f"export HF_TOKEN={TOKEN}\n")
    with pytest.raises(ValueError, match=r"README.md:\d+: contains something like a secret") as caught:
        upload(copy, "me/ok", dry_run=True)
    assert TOKEN not in str(caught.value)
    (copy / "README.md").unlink()
    with pytest.raises(ValueError, match="README.md changed or deleted since the export"):
        upload(copy, "me/ok", dry_run=True)
    shutil.rmtree(copy)
    shutil.copytree(exported, copy)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0\0")
    with pytest.raises(ValueError, match="model.safetensors changed or deleted since the export"):
        upload(copy, "me/ok", dry_run=True)


def test_an_export_opens_and_is_a_beginning(r, exported, workdir, tmp_path):
    "It opens like a run, starts another one, and is not read after a change"
    opened = lmnotes.load(exported)
    assert opened.generate("The", 8) == r.generate("The", 8) and opened.metrics == r.metrics
    assert opened.step == r.step and opened.config.ctx_len == r.config.ctx_len
    with pytest.raises(ValueError, match="is an exported model, which holds one checkpoint"):
        lmnotes.load(exported, which="best")
    lm = load_initial_weights(new_lm(r.lm.arch, **asdict(r.lm.cfg)), exported)
    assert all(torch.equal(t, merged_state_dict(r.lm)[name]) for name, t in lm.state_dict().items())
    copy = shutil.copytree(exported, tmp_path / "copy")
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "memory.safetensors").write_bytes(b"a file that belongs to the weights, as of nanothink")
    manifest["files"]["memory.safetensors"] = sha256_file(copy / "memory.safetensors")
    (copy / "manifest.json").write_text(json.dumps(manifest))
    for name in ("config.json", "model.safetensors", "run.json", "memory.safetensors", "tokenizer/tokenizer.json"):
        before = (copy / name).read_bytes()
        (copy / name).write_bytes(before + b" ")
        for use in (lmnotes.load, lambda path: load_initial_weights(lm, path)):
            with pytest.raises(CheckpointError, match=f"{name}: missing, or changed since the export"):
                use(copy)
        (copy / name).write_bytes(before)
    assert lmnotes.load(copy).step == r.step
    assert lmnotes.load(ROOT / "tests/golden/0.1/export").step == 400
