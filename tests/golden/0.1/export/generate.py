"""Write text with the model in this folder: `python generate.py "Once upon a time" --n 200`."""

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # lmnotes as it was when this model was exported

from safetensors.torch import load_file

from lmnotes.checkpoint import load_weights
from lmnotes.generation import stream
from lmnotes.lm import new_lm, parse_model_args
from lmnotes.tokenizer import load_tokenizer


def load(folder=HERE, model_args=""):
    "(model, tokenizer, what config.json says) of an exported folder; `model_args` changes values that decide no weights"
    about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    lm = new_lm(about["arch"], **{**about["config"], **parse_model_args(about["arch"], model_args)})
    load_weights(lm, load_file(folder / "model.safetensors"), folder / "model.safetensors")
    lm.attach(folder)
    return lm.eval(), load_tokenizer(folder / "tokenizer"), about


def main():
    "The command line"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompt", nargs="?", default="", help="text to go on from; empty: the beginning of a text")
    parser.add_argument("--n", type=int, default=200, help="tokens at most")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest")
    parser.add_argument("--top-k", type=int, default=0, help="0: all")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model-args", default="", help="such as thinking_steps=5, for a model that thinks")
    args = vars(parser.parse_args())
    lm, tokenizer, about = load(model_args=args.pop("model_args"))
    prompt = args.pop("prompt")
    print(prompt, end="")
    for piece in stream(lm, tokenizer, prompt or about["start"], **args):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
