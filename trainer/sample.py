"""Writes text with a trained model.

    python -m trainer.sample --run DIR [--prompt TEXT] [--tokens 200] [--temperature 0.8] [--top-k 50] [--seed 0]

DIR is the folder of a finished training; its tokenizer is the one of its token files.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from trainer import job

# isort: split
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from trainer.job import UserError
from trainer.language import LanguageModel
from trainer.models import build
from trainer.prepare import read_tokenizer, vocab_size_of

LEAST_TEMPERATURE = 1e-6  # float32 ends at 3e38, and no logit comes near a 1e-6th of that


def main() -> int:
    """Exit code 0, when the text is written."""
    parser = argparse.ArgumentParser(description="Writes text with a trained model.", allow_abbrev=False)
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished training")
    parser.add_argument("--prompt", default="\n", help="what the text begins with")
    parser.add_argument("--tokens", type=int, default=200, help="tokens to write")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    parser.add_argument("--top-k", type=int, default=50, help="choose among the likeliest K; 0: among all")
    parser.add_argument("--seed", type=int, default=0, help="of the choices")
    arguments = parser.parse_args()
    check(SimpleNamespace(**vars(arguments)))
    model, config = load_run(arguments.run)
    tokenizer = tokenizer_of(arguments.run, config.dataset, model.shape.vocab_size)
    prompt = torch.tensor([tokenizer.encode(arguments.prompt, add_special_tokens=False).ids])
    if not prompt.numel():
        raise UserError("--prompt is no token: give some text")
    written = generate(model, prompt, arguments.tokens, arguments.temperature, arguments.top_k, arguments.seed)
    print(tokenizer.decode(written[0].tolist()))
    return 0


def check(options: SimpleNamespace) -> None:
    """Raises UserError for options that no text can be written with."""
    job.check_numbers(options, ["tokens", "top_k", "seed"], int, 0)
    job.check_numbers(options, ["temperature"], float, 0)
    if 0 < options.temperature < LEAST_TEMPERATURE:
        raise UserError(f"temperature is {options.temperature}: give 0, or at least {LEAST_TEMPERATURE}")


def tokenizer_of(run: Path, dataset: str | None, vocab_size: int) -> Tokenizer:
    """The tokenizer of a run's token files. Raises UserError where it is not there, or not the model's."""
    file = Path(dataset or "", "tokenizer.json").absolute()
    if not file.is_file():
        raise UserError(
            f"{file} is not there: sample from the folder in which the training was started, or write where the token "
            f"files are under dataset in {run / 'model' / 'config.json'}"
        )
    tokenizer = read_tokenizer(file)
    if (n := vocab_size_of(tokenizer)) != vocab_size:
        raise UserError(f"{file} knows {n} tokens and the model {vocab_size}: put back the one it was trained with")
    return tokenizer


def load_run(folder: Path) -> tuple[LanguageModel, SimpleNamespace]:
    """The model of a finished training on the CPU, and its settings. Raises UserError where there is none."""
    file = folder / "model" / "config.json"
    if not file.is_file():
        raise UserError(f"{file} is missing: give the folder of a training that has ended")
    settings = job.read_json(file)
    config = SimpleNamespace(**settings)
    model = build(config, settings["shape"]["vocab_size"])
    try:
        model.load_state_dict(load_file(folder / "model" / "model.safetensors"))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder / 'model'} is not whole ({error}): train again") from error
    return model.eval(), config


@torch.inference_mode()
def generate(
    model: LanguageModel, prompt: Tensor, n: int, temperature: float = 0.8, top_k: int = 50, seed: int = 0
) -> Tensor:
    """ "row seq" prompts with `n` more tokens each. A Transformer sees the last seq_len of them."""
    generator = torch.Generator().manual_seed(seed)
    written, state, last = prompt, None, prompt
    for _ in range(n):
        if model.shape.architecture == "lstm":
            hidden, state = model(last, state)
        else:
            hidden, _ = model(written[:, -model.shape.seq_len :])
        logits = model.logits(hidden[:, -1])
        if temperature == 0:
            last = logits.argmax(-1, keepdim=True)
        else:
            kept = logits.topk(min(top_k or logits.shape[-1], logits.shape[-1]), -1)
            drawn = torch.multinomial((kept.values / temperature).softmax(-1), 1, generator=generator)
            last = kept.indices.gather(1, drawn)
        written = torch.cat([written, last], 1)
    return written


if __name__ == "__main__":
    job.run(main)
