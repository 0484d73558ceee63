"""The migration guides: every command of a page is run, in order, in a small project, and every promise is checked.

The headings of a table select the check for its rows, and the rows are the data of the check.
"""

import ast
import fnmatch
import json
import os
import random
import re
import shlex
import shutil
import subprocess
from contextlib import nullcontext
from importlib import import_module

import pytest
import torch
from helpers import ROOT, lmnotes_command, recipe_parameters, run_in_process

from lmnotes.apps.papermill_engine import fill_in_command
from lmnotes.data.tokenizer import BPETokenizer
from lmnotes.models.gpt2 import save_hf
from lmnotes.nn.lm import new_lm

pytestmark = pytest.mark.usefixtures("short_texts")
PAGES = {path.stem: path for path in sorted((ROOT / "docs/guides").glob("*.md"))}
SYSTEMS = dict(  # Heading of the first column of each page
    agiformer="AGIFORMER",
    fresh_or_resume="Fresh-or-resume guide",
    nanothink="NanoThink",
    text_only="MultiModalCreature",
    tisslm="TissLM",
)


# Reading the tables of a page


def cells(line):
    "Return the cells of a row, in which `\\|` is a literal bar"
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]


def spans(cell):
    "Return the code spans of a cell"
    return [code.strip() for code in re.findall(r"(`+)(.+?)\1(?!`)", cell) for code in code[1:]]


def read_page(path):
    "Return [(line number, headings, cells, files and variables named before the table)] of all rows of a page"
    lines, rows, heads, about = path.read_text(encoding="utf-8").splitlines(), [], None, []
    for number, line in enumerate(lines, 1):
        if line.startswith("|"):
            found = cells(line)
            if heads is None:
                heads = tuple("System" if cell == SYSTEMS[path.stem] else cell for cell in found)
                assert heads in CHECKS, f"{path.name}, line {number}: no check for a table with these headings: {found}"
            elif set(line) <= set("|- "):
                continue
            else:
                assert len(found) == len(heads), f"{path.name}, line {number}: {len(found)} cells under {heads}"
                assert all(found[:2]), f"{path.name}, line {number}: an empty cell"
                rows.append((number, heads, found, about))
        elif not line.strip():
            heads = None
        else:
            own = [code for code in spans(line) if re.search(r"\.(ipynb|yaml|json)$|^[A-Z_]+=", code)]
            about = about + own if lines[number - 2].strip() else own
    return rows


# Running the commands of a row


def execute(line, given, variables):
    "Run a line with small parameters and variables (notebooks in this process) and return the exit code"
    os.environ.update(variables)
    words = shlex.split(line)
    while re.fullmatch(r"[A-Z_0-9]+=.*", words[0]):
        name, _, value = words.pop(0).partition("=")
        os.environ[name] = subprocess.check_output(["bash", "-c", f"printf %s {value}"], text=True)
    if words[0] == "lmnotes":
        return lmnotes_command(*words[1:])
    assert all(word in ("-p", "-r") for word in words[2::3]), f"{line}: parameters are given by -p NAME VALUE"
    try:
        print(fill_in_command(words)[1])
    except ValueError as error:
        print(f"lmnotes: {error}")
        return 1
    given = given | dict(zip(words[3::3], words[4::3]))
    return lmnotes_command("notebook", "--path", words[1], "--params", *(f"{n}={v}" for n, v in given.items()))


def evaluate(code):
    "Run a line of Python, and print its value"
    tree, names = ast.parse(code), {}
    last = ast.Expression(tree.body.pop().value)
    with torch.device("meta") if "n_params(" in code else nullcontext():  # To count parameters needs no values
        exec(compile(tree, code, "exec"), names)
        print(eval(compile(last, code, "eval"), names))
    return 0


class Reader:
    "Reader of a page, who runs its commands in a separate project"

    def __init__(self, workdir, page):
        self.place, self.page, self.toy = workdir, page, TOYS[page]
        self.given, self.records, self.said, self.smaller = {}, {}, "", set()

    def small(self, line):
        "Replace large values in a line with small ones"
        for large, small in self.toy.get("instead", {}).items():
            if large in line:
                line = line.replace(large, small)
                self.smaller.add(large)
        return line

    def type(self, line):
        "Run a line, and return its exit code and output"
        log = self.place / "log"
        before = log.stat().st_size if log.exists() else 0
        if re.match(r"import |from ", line):
            code = run_in_process(self.place, evaluate, line)
        elif re.match(r"lmnotes |papermill |[A-Z_]+=", line):
            line = self.small(line)
            notebook = re.search(r"nbs/[\w/]+\.ipynb", line)
            toy = self.toy["notebooks"].get(notebook[0], {}) if notebook else {}
            code = run_in_process(self.place, execute, line, toy, self.toy.get("variables", {}))
            self.note(toy, line)
        else:
            with open(log, "ab") as out:
                code = subprocess.run(["bash", "-c", line], cwd=self.place, stdout=out, stderr=out).returncode
        output = log.read_bytes()[before:].decode(errors="replace")
        self.said += output
        return code, output

    def note(self, toy, line):
        "Store the parameters of the run that wrote a new record"
        for path in self.place.rglob("run.json"):
            content = path.read_bytes()
            if content not in self.records:  # Otherwise the record is unchanged or moved
                told = dict(re.findall(r"-p (\w+) (\S+)", line) + re.findall(r"\b([A-Z_0-9]+)=(\S+)", line))
                self.records[content] = toy | self.toy.get("variables", {}) | told
            self.given[path.parent] = self.records[content]

    # One check for each kind of table. Each returns a problem, or nothing

    def command(self, row, about):
        "Each command succeeds"
        lines = spans(row[1])
        if not lines:
            return "there is nothing to type"
        for line in lines:
            code, output = self.type(line)
            if code:
                return f"{line}: exit code {code}\n{output[-3000:]}"

    def trouble(self, row, about):
        "The commands print the words in the last cell"
        lines, words = spans(row[1]), spans(row[2])
        if not lines or not words:
            return "a line to type and words that are printed are needed"
        output = "".join(self.type(line)[1] for line in lines)
        return "\n".join(f"{word!r} was not printed:\n{output[-3000:]}" for word in words if not shows(word, output))

    def parameter(self, row, about):
        "`name=default` is the default in the recipe's cell, and another value that was given is in the run's record"
        notebook, record = about
        name, _, default = spans(row[1])[0].partition("=")
        defaults = recipe_parameters(self.place / notebook)
        if name not in defaults or str(defaults[name]) != default.strip("'\""):
            return f"{notebook} has {name}={defaults.get(name)!r}"
        return self.recorded(name, defaults[name], record, spans(row[2]))

    def setting(self, row, about):
        "`name=default` is the default in the configuration, and another value that was given is in the run's record"
        from lmnotes.recipes.text_only_config import DEFAULT_SETTINGS, load_text_config

        name, _, default = spans(row[1])[0].partition("=")
        if name not in DEFAULT_SETTINGS or str(DEFAULT_SETTINGS[name]) != default:
            return f"the configuration has {name}={DEFAULT_SETTINGS.get(name)!r}"
        self.given[(self.place / about[1]).parent] = load_text_config(self.place / about[0])
        return self.recorded(name, DEFAULT_SETTINGS[name], about[1], spans(row[2]))

    def variable(self, row, about):
        "`NAME=default` is the default of the environment reader, and another given value is in the run's record"
        from lmnotes.recipes.fresh_or_resume_config import load_config_fresh_from_env

        name, _, default = spans(row[1])[0].partition("=")
        mode, record = about
        config = vars(load_config_fresh_from_env(dict([mode.split("=")])))
        if name.lower() not in config or str(config[name.lower()]) != default:
            return f"with {mode} the default is {name}={config.get(name.lower())!r}"
        return self.recorded(name, config[name.lower()], record, spans(row[2]))

    def recorded(self, name, default, record, paths):
        "Check that a record contains the given value of a parameter, which must differ from the default"
        (file,) = sorted(self.place.glob(record))[-1:] or [None]
        if file is None:
            return f"there is no {record}"
        value = self.given[file.parent].get(name)
        if value is None or str(value) == str(default):
            return f"the test gives {name}={value}, and the default is {default}: it shows nothing"
        for path in paths:
            path, _, wanted = path.partition("=")
            found = json.loads(file.read_bytes())
            for key in path.split("."):
                if key not in found:
                    return f"{record} has no {path}"
                found = found[key]
            if not same(wanted or value, found):
                return f"{record} has {path}={found!r}, and {name}={value} was given"
        return "" if paths else "there is no place in the record"

    def file(self, row, about):
        "A file exists for each name, in which `*` matches anything"
        patterns = spans(row[1])
        there = [str(path.relative_to(self.place)) for path in self.place.rglob("*")]
        lacking = [pattern for pattern in patterns if not fnmatch.filter(there, pattern.rstrip("/"))]
        return f"there is no {lacking[0]}" if lacking else "" if patterns else "there is no name"

    def line(self, row, about):
        "Each line was printed. `#` matches a number and `…` anything"
        lines = spans(row[1])
        lacking = [line for line in lines if not shows(line, self.said)]
        return f"{lacking[0]!r} was not printed" if lacking else "" if lines else "there is no line"

    def name(self, row, about):
        "Each name exists in its module"
        for code in spans(row[1]):
            module, _, name = code.rpartition(".")
            if not hasattr(import_module(module), name):
                return f"there is no {code}"
        return "" if spans(row[1]) else "there is no name"

    def elsewhere(self, row, about):
        "The test that the row names exists"
        tests = spans(row[2])
        for code in tests:
            file, _, name = code.partition("::")
            if not (ROOT / file).exists() or not re.search(rf"\b{name}\(", (ROOT / file).read_text()):
                return f"there is no {code}"
        return "" if tests else "there is no test"

    def figure(self, row, about):
        "The numbers are in the results or in the log, in a line with the command"
        command = next((c for c in re.findall(r"\w+\.py", row[2]) if (ROOT / "benchmarks" / c).exists()), None)
        if command is None:
            return "there is no such command in benchmarks/"
        lines, last = (ROOT / "LOG.md").read_text().splitlines(), ""
        for line in (ROOT / "docs/results.md").read_text().splitlines():
            last = last if line.endswith("| the same |") else line
            lines.append(f"{line} {last.rpartition('|')[0].rpartition('|')[2]}")  # The command of `the same`
        known = " ".join(line for line in lines if command in line)
        lacking = [
            n
            for n in re.findall(r"\d[\d,.]*\d|\d", row[1])
            if not re.search(rf"(?<![\d.,]){re.escape(n)}(?!\d)", known)
        ]
        return f"{lacking[0]} is not among the figures of {command}" if lacking else ""


def shows(pattern, text):
    "Return True if a line of the text matches the pattern"
    words = re.escape(pattern.strip()).replace(r"\#", r"[-+]?\d[\d,.]*(?:e[-+]?\d+)?").replace("…", ".*")
    return re.search(rf"^[ \t]*{words}[ \t]*$", text, re.M) is not None


def same(value, found):
    "Return True if the found value equals the given one, or is a text that contains it"
    try:
        return float(value) == float(found)
    except (TypeError, ValueError):
        return str(value) == str(found) or (isinstance(found, str) and str(value).removeprefix("./") in found)


CHECKS = {
    ("System", "Command in lmnotes", "Note"): Reader.command,
    ("System", "Command in lmnotes", "Message"): Reader.trouble,
    ("System", "Parameter in lmnotes", "In the record", "Note"): Reader.parameter,
    ("System", "Setting in lmnotes", "In the record", "Note"): Reader.setting,
    ("System", "Variable in lmnotes", "In the record", "Note"): Reader.variable,
    ("System", "File in lmnotes", "Note"): Reader.file,
    ("System", "Line in lmnotes", "Note"): Reader.line,
    ("System", "Name in lmnotes", "Note"): Reader.name,
    ("System", "In lmnotes", "Shown by"): Reader.elsewhere,
    ("Measurement", "Figure", "Command"): Reader.figure,
}

# Small settings for each page: parameters of its notebooks, variables, and values that replace large ones in its lines

TOYS = {
    "tisslm": dict(
        notebooks={
            "nbs/recipes/tisslm.ipynb": dict(
                VOCAB_SIZE=300, seq_len=16, batch_size=8, epochs=1, checkpoint_every=15, stride=8, lr=0.002
            )
        },
    ),
}
TOYS["agiformer"] = dict(
    notebooks={
        "nbs/recipes/agiformer.ipynb": dict(
            D_MODEL=16,
            N_LAYERS=1,
            NUM_HEADS=2,
            PATCH_SIZE=2,
            WINDOW_SIZE=8,
            THINKING_STEPS=2,
            BATCH_SIZE=2,
            SEQ_LEN=64,
            MAX_STEPS=20,
            BASE_LR=2e-4,
            WARMUP_STEPS=5,
            GRAD_CLIP=1.0,
            VAL_INTERVAL=10,
            DEVICE="cpu",
            DTYPE="float32",
            DATA="text",
            FINAL_BATCHES=2,
        ),
        "nbs/generate.ipynb": {},
    },
    instead={"20000": "30"},
)
TOYS["text_only"] = dict(notebooks={"nbs/recipes/text_only.ipynb": {}, "nbs/generate.ipynb": {}})
EXPERT = dict(tokenizer="bytes", d_model=16, n_heads=2, n_layers=1, d_inner=32, d_state=8, max_seq_len=32, dropout=0.0)
EXPERT |= dict(ffn_mult=2, training_steps=20, batch_size=16, warmup_steps=2, lr=3e-3, max_epochs=10, log_interval=10)
EXPERT |= dict(patience=0, grad_clip=0.5, use_amp=False, device="cpu")
JOINED = dict(
    d_model=16, n_heads=2, head_dim=8, kv_latent_dim=8, rope_dim=4, max_seq_len=32, memory_chunk=8, dropout=0.0
)
JOINED |= dict(
    batch_size=4, grad_accum_steps=2, warmup_steps=2, lr=3e-3, max_epochs=5, log_interval=10, entropy_reg=0.02
)
JOINED |= dict(device="cpu", transformer_ckpt="checkpoints/transformer_expert.pt")
TOYS["nanothink"] = dict(
    notebooks={"nbs/recipes/pretrain_expert.ipynb": EXPERT, "nbs/recipes/train_mla.ipynb": JOINED},
)
TOYS["fresh_or_resume"] = dict(
    notebooks={"nbs/recipes/fresh_or_resume.ipynb": {}},
    variables=dict(
        TRAINING_DATA_SOURCE="text.txt",
        BATCH_SIZE="4",
        BLOCK_SIZE="16",
        N_EMBD="16",
        N_HEAD="2",
        N_LAYER="1",
        DROPOUT="0.1",
        LEARNING_RATE="1e-3",
        LORA_RANK="4",
        TOKENIZATION_METHOD="custom_bpe",
        CUSTOM_VOCAB_SIZE="300",
        EVAL_ITERS="2",
        EVAL_INTERVAL="100",
        MAX_NEW_TOKENS="20",
        DEVICE="cpu",
    ),
    instead={"MODEL_TYPE=gpt2 USE_LORA": "MODEL_TYPE=gpt2 GPT2_MODEL_NAME=tiny-gpt2 USE_LORA"},
)
# Content of each guide. A page without one of these has lost a row
ITEMS = {
    "tisslm": """python3 quanta_tissu/tisslm/pipelines/full_training_steps.py  CORPUS_PATH = "./my_corpus"  CORPUS_PATH  ./corpus  SAVE_DIR
        ./training_output  VOCAB_SIZE  5000  seq_len  128  batch_size  32  epochs  5  lr  1e-3  checkpoint_every  1000  checkpoint_step_{step}.pt
        tokenizer/  vocab.json  merges.txt  checkpoint_step_*.pt  final_model.pt  .txt""",
    "agiformer": """git clone  cd agi-former  pip install -r requirements.txt  python train.py  Step 10: Loss = 2.8451  LR = 3.00e-05
        -- VALIDATION: Loss = 1.5650  Saved best_model.pth  D_MODEL = 512  N_LAYERS = 6  NUM_HEADS = 8  PATCH_SIZE = 4  WINDOW_SIZE = 128
        THINKING_STEPS = 3  BATCH_SIZE = 4  MAX_STEPS = 5000  BASE_LR = 3e-4  WARMUP_STEPS = 100  GRAD_CLIP = 0.5  d_model=256, n_layers=4
        d_model=512, n_layers=6  d_model=768, n_layers=8  thinking_steps=0  thinking_steps=3  thinking_steps=5  ./data/enwik8
        get_enwik8_dataloader  get_custom_dataloader(batch_size, seq_len)  [*] Creating AGIFORMER model...  [*] Parameters: ~50M
        [*] Downloading enwik8...  best_model.pth  last_model.pth  BPC = Loss / ln(2)  Step 150: Loss = nan  1e-4  1.0  CUDA out of memory
        BATCH_SIZE  DEVICE = 'cuda'  torch.cuda.amp.autocast()  torchrun --nproc_per_node=4 train.py  DistributedDataParallel
        model.load_state_dict(torch.load("last_model.pth"))  Resumed from checkpoint  5e-4  1e-5  3e-4  0.1  2.0  0.5
        python upload_to_hf.py --repo YOUR_USERNAME/agiformer --token YOUR_HF_TOKEN  python generate.py  python inspect_reasoning.py
        MAX_STEPS  src/  20k+  d_model  n_layers  Loss = -log P(next_byte | context)""",
    "text_only": """internal_voice_tokens  internal_text  .\\venv\\Scripts\\Activate.ps1  .\\venv\\Scripts\\python.exe --version
        .\\venv\\Scripts\\python.exe -c "import torch; import transformers; print('Environment OK')"  .bin  .pt  .npy  uint16
        scripts/tokenize_corpus.py --input data/your_corpus.txt --output data/corpus.bin  configs/text_only_config.yaml  max_steps: 31250
        batch_size: 32  log_interval: 100  save_interval: 5000  num_layers: 6  hidden_dim: 512  num_attention_heads: 8  ffn_dim: 2048
        max_position_embeddings: 2048  vocab_size: 50257  embedding_dim: 512  max_seq_length: 2048  training:  model:  transformer:
        encoders:  internal_voice:  scripts/train_text_only.py --config configs/text_only_config.yaml --data data/corpus.bin --dry-run
        Loading config from configs/text_only_config.yaml...  Using device: cuda  Creating dataset from data/corpus.bin...
        Loaded X,XXX,XXX tokens from data/corpus.bin  Creating X,XXX samples of length 512...  Creating DataLoader with batch_size=8...
        Initializing MultiModalCreature model...  Model parameters: X,XXX,XXX total, X,XXX,XXX trainable
        *** DRY RUN MODE: Training for only 10 steps ***  Initializing Trainer...  ====  Starting training...
        Step 1/10 | Loss: X.XXX | loss_internal_text: X.XXX | samples/sec: XX.X  Step 10/10 | Loss:  Training complete!  Ctrl+C
        Trainer.load_checkpoint()  checkpoints/text_only/  model_step_1000.pt  model_step_2000.pt  model_final.pt  loss_internal_text
        samples/sec  scripts/test_text_generation.py  Once upon a time  Generating...  Done!  FileNotFoundError: Token file not found
        RuntimeError: CUDA out of memory  batch_size: 4  lr  vocab_size  pip list  MultiModalCreature(config)  pytest  python""",
    "nanothink": """{"text": "The actual text content...", "source": "wikitext", "id": 0}  text  source  id  *.jsonl  mkdir -p data/my_domain
        cp my_data.jsonl data/my_domain/  python scripts/pretrain_experts.py --expert transformer --domains my_domain  DataConfig.domains
        nano_think/config.py  mkdir -p my_training_data/my_domain  cp my_data.jsonl my_training_data/my_domain/
        python scripts/pretrain_experts.py --expert transformer --data_dir my_training_data
        python scripts/pretrain_experts.py --expert transformer  python scripts/pretrain_experts.py --expert state_space
        python scripts/pretrain_experts.py --expert diffuser  checkpoints/<expert>_expert.pt  python scripts/train_mla.py
        checkpoints/nanothink_mla.pt  python scripts/pretrain_experts.py --expert transformer --resume  python scripts/train_mla.py --resume
        python scripts/pretrain_experts.py --expert transformer --resume checkpoints/transformer_expert.pt
        python scripts/train_mla.py --resume checkpoints/nanothink_mla.pt  *_interrupted.pt  *_epoch*.pt  *.pt  model_state
        optimizer_state  step  epoch  amp_scaler  strict=False  checkpoints/<expert>_expert_epoch{N}.pt
        checkpoints/nanothink_mla_epoch{N}.pt  --resume checkpoints/transformer_expert_epoch10.pt  max_epochs  --expert  --data_dir
        --resume  None  --device  --use_vector_store  False  TrainExpertConfig.use_amp  amp_dtype  bf16  fp16  grad_accum_steps=4
        batch_size * 4 = 64  grad_clip=1.0  warmup_steps  entropy_reg=0.01  ModelConfig  d_model=384  max_seq_len=512
        TransformerConfig  n_layers=6  ffn_mult=4  DiffuserConfig  n_layers=4  training_steps=100  StateSpaceConfig  d_state=16
        MLAConfig  n_experts=3  n_heads=6  TrainExpertConfig  lr=3e-4  batch_size=32  max_epochs=20  TrainDiffuserConfig  lr=1e-4
        batch_size=64  TrainMLAConfig  batch_size=16  max_epochs=30  DataConfig  tokenizer=gpt2  val_split=0.1  transformer
        diffuser  state_space  data/academic/arxiv_abstracts.jsonl  data/general/wikitext.jsonl""",
    "fresh_or_resume": """training.py  training_resume.py  CHECKPOINT_PATH  MODEL_TYPE  USE_LORA  TRAINING_DATA_SOURCE  TRAINING_STEPS  TEST_MODE
        GPT2Wrapper  TeeOutput  write_output_file  RESUME_STEPS  LEARNING_RATE  BATCH_SIZE  model_state_dict  optimizer_state_dict
        hyperparameters  vocab_size  block_size  batch_size  get_data_source_name  generate_output_filename  get_model_name  config.py
        data.py  models/__init__.py  train_loop.py  checkpointing.py  io_utils.py  TrainingConfig  model_type: str  use_lora: bool
        training_data_source: str  batch_size: int  block_size: int  training_steps: int  start_step: int  learning_rate: float
        n_embd: int  n_head: int  n_layer: int  dropout: float  gpt2_model_name: str  tokenization_method: str
        custom_vocab_size: Optional[int]  enable_checkpoints: bool  checkpoint_interval: int  checkpoint_dir: str  log_dir: str
        enable_output_to_file: bool  output_dir: str  test_mode: bool  load_config_fresh_from_env()
        load_config_from_checkpoint(checkpoint, env)  select_device(device_env: str = "auto")  prepare_data_and_tokenizer
        build_model(config, vocab_size, device)  BigramLanguageModel  BigramLanguageModelLoRA  build_optimizer(config, model)
        requires_grad  get_batch(split, train_data, val_data, config, device)  save_checkpoint
        estimate_loss(model, train_data, val_data, config, device)  run_training  "QUESTION: "  ENABLE_OUTPUT_TO_FILE
        training_legacy.py  training_resume_legacy.py  RESUME_STEPS=300  MODEL_TYPE=from_scratch""",
}


def sentences(seed, words, n=200):
    draw = random.Random(seed)
    return "".join(" ".join(draw.choices(words.split(), k=7)) + ".\n" for _ in range(n))


def write_material(workdir, page):
    "Write a project and the data that the page needs"
    shutil.copy(ROOT / "settings.ini", workdir)
    shutil.copytree(ROOT / "nbs/recipes", workdir / "nbs/recipes", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    for name in ("generate", "train", "prepare"):
        shutil.copy(ROOT / f"nbs/{name}.ipynb", workdir / "nbs")
    for name, content in re.findall(r"^```python\n# (\S+\.py)\n(.*?)^```", PAGES[page].read_text(), re.M | re.S):
        (workdir / name).write_text(content)
    MATERIAL[page](workdir)


def material_tisslm(workdir):
    for folder, seed in (("corpus", 0), ("my_corpus", 1)):
        (workdir / folder).mkdir()
        for name in ("a", "b"):
            (workdir / folder / f"{name}.txt").write_text(
                sentences(f"{seed}{name}", "wave salt tide foam harbour gull sea")
            )


def material_agiformer(workdir):
    for name, seed in (("text", 0), ("mine.txt", 1)):
        (workdir / name).write_text(sentences(seed, "the patch thinks of bytes", n=250))


# With tabs, as in the text-only guide
YAML = """
training:
	max_steps: 20
	batch_size: 4
	log_interval: 5
	save_interval: 10
	scheduler:
		warmup_steps: 5
	optimizer:
		lr: 1e-2

model:
	transformer:
		num_layers: 1       # Tiny model depth
		hidden_dim: 16
		num_attention_heads: 2
		ffn_dim: 64
		max_position_embeddings: 32

	encoders:
		internal_voice:
			vocab_size: {vocab_size}
			embedding_dim: 16
			max_seq_length: 32
"""


def material_text_only(workdir):
    text = sentences(0, "once upon a time there was a wave", n=600)
    tokenizer = BPETokenizer.train([text], 300)
    tokenizer.save(workdir / "data/gpt2")  # A small vocabulary in place of GPT-2's
    (workdir / "data/your_corpus.txt").write_text(text)
    (workdir / "nbs/recipes/text_only_config.yaml").write_text(YAML.format(vocab_size=tokenizer.vocab_size))


def material_nanothink(workdir):
    for file in ("my_data.jsonl", "data/sea/texts.jsonl", "data/hills/texts.jsonl"):
        (workdir / file).parent.mkdir(parents=True, exist_ok=True)
        lines = sentences(file, "wave salt tide hill river stone light wind", n=20).splitlines()
        rows = [json.dumps(dict(text=line, source="test", id=i)) + "\n" for i, line in enumerate(lines)]
        (workdir / file).write_text("".join(rows))


def material_fresh_or_resume(workdir):
    text = sentences(0, "wave salt tide foam harbour gull sea", n=600)
    (workdir / "text.txt").write_text(text)
    (workdir / "other.txt").write_text(sentences(1, "moss fern oak bark owl clearing", n=600))
    tokenizer = BPETokenizer.train([text], 300)
    shape = dict(n_positions=32, ctx_len=32, d_model=16, n_layers=2, n_heads=2)
    (workdir / "tiny-gpt2").mkdir()
    save_hf(new_lm("gpt2", vocab_size=tokenizer.vocab_size, **shape), workdir / "tiny-gpt2")
    for folder in ("tiny-gpt2", "data/gpt2"):
        tokenizer.save(workdir / folder)


MATERIAL = dict(
    fresh_or_resume=material_fresh_or_resume,
    tisslm=material_tisslm,
    agiformer=material_agiformer,
    text_only=material_text_only,
    nanothink=material_nanothink,
)


def test_every_guide_has_its_page():
    assert sorted(PAGES) == sorted(SYSTEMS)


WRONG = {
    "| TissLM | Parameter in lmnotes | In the record | Note |\n|---|---|---|---|\n| `seq_len` | `seq_len=64` | `config.ctx_len` | |": "seq_len=128",
    "| TissLM | Parameter in lmnotes | In the record | Note |\n|---|---|---|---|\n| `lr` | `lr=0.001` | `config.lr` | |": "shows nothing",
    "| TissLM | Parameter in lmnotes | In the record | Note |\n|---|---|---|---|\n| `epochs` | `epochs=5` | `config.steps` | |": "config.steps=1",
    "| TissLM | File in lmnotes | Note |\n|---|---|---|\n| a | `run/*.pt` | |": "there is no run/*.pt",
    "| TissLM | Line in lmnotes | Note |\n|---|---|---|\n| a | `step #/#` | |": "'step #/#' was not printed",
    "| TissLM | Name in lmnotes | Note |\n|---|---|---|\n| a | `lmnotes.runs.run.runn` | |": "there is no lmnotes.runs.run.runn",
    "| TissLM | In lmnotes | Shown by |\n|---|---|---|\n| a | b | `tests/test_guides.py::test_none` |": "there is no tests/test_guides.py::test_none",
    "| TissLM | Command in lmnotes | Note |\n|---|---|---|\n| a | `exit 3` | |": "exit 3: exit code 3",
    "| TissLM | Command in lmnotes | Note |\n|---|---|---|\n| a | nothing | |": "there is nothing to type",
    "| TissLM | Command in lmnotes | Message |\n|---|---|---|\n| a | `echo 12 and more` | `# and less` |": "'# and less' was not printed",
    "| Measurement | Figure | Command |\n|---|---|---|\n| a | 98.7 | `python benchmarks/memory.py` |": "98.7 is not among",
    "| Measurement | Figure | Command |\n|---|---|---|\n| a | 1 | `python benchmarks/none.py` |": "no such command",
}


@pytest.mark.parametrize("table", WRONG)
def test_wrong_rows_are_found(tmp_path, table):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.json").write_text(json.dumps(dict(config=dict(steps=1, lr=0.001))))
    shutil.copytree(ROOT / "nbs/recipes", tmp_path / "nbs/recipes")
    (tmp_path / "tisslm.md").write_text(f"In `nbs/recipes/tisslm.ipynb` and `run/run.json`:\n\n{table}\n")
    reader = Reader(tmp_path, "tisslm")
    reader.given[tmp_path / "run"] = dict(seq_len=16, lr=0.001, epochs=2)
    ((_, heads, row, about),) = read_page(tmp_path / "tisslm.md")
    assert WRONG[table] in CHECKS[heads](reader, row, about)


@pytest.mark.parametrize(
    "table",
    ["| TissLM | Else |\n|---|---|\n| a | b |", "| TissLM | File in lmnotes | Note |\n|---|---|---|\n| a | b |"],
)
def test_unreadable_tables_are_found(tmp_path, table):
    (tmp_path / "tisslm.md").write_text(table)
    with pytest.raises(AssertionError, match="tisslm.md, line"):
        read_page(tmp_path / "tisslm.md")


@pytest.mark.parametrize("page", PAGES)
def test_every_row_holds(page, tmp_path):
    "Every row holds, from top to bottom, as a reader would run it"
    write_material(tmp_path, page)
    reader, wrong = Reader(tmp_path, page), []
    for number, heads, row, about in read_page(PAGES[page]):
        if output := CHECKS[heads](reader, row, about):
            wrong.append(f"docs/guides/{page}.md, line {number}: {output}")
    assert not wrong, "\n\n".join(wrong)
    assert reader.smaller == set(TOYS[page].get("instead", {})), "a value is made small that is not there"


@pytest.mark.parametrize("page", PAGES)
def test_pages_cover_the_whole_guide(page):
    text = PAGES[page].read_text(encoding="utf-8").replace("\\|", "|")
    there = [code for _, _, row, _ in read_page(PAGES[page]) for code in spans(row[0])]
    lacking = [item for item in re.split(r"\s{2,}", ITEMS[page].strip()) if not any(item in code for code in there)]
    assert not lacking
    assert text.startswith("# Migrating from ") and not re.search(r"https?:|github", text)
