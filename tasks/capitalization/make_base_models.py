"""Makes the two small Llama base models of the demo, in Hugging Face format with tokenizer and chat template.

    python make_base_models.py [--out models]

They learn, each on one core, to repeat the word that they are given, whatever they are asked to do with it: a base
that does not capitalise, but can be taught to. A folder that is there with this VERSION is kept.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import string
import sys
from dataclasses import dataclass
from pathlib import Path
from queue import Empty
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tqdm import tqdm

from trainer import job
from trainer.chat import ChatTokenizer, Example

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

VERSION = 2  # raise it with every change below that makes other models
PAD, BEGIN, END, SYSTEM, USER, ASSISTANT = (f"<|{n}|>" for n in ("pad", "begin", "end", "system", "user", "assistant"))
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ASKED = ("", "Capitalize: ", "Repeat: ")  # what stands before the word; the answer is the word alone
SEED = 0
BATCH_SIZE = 32
LEARNT = 0.1  # nats a token; a model that repeats ends near 0.01, one that guesses letters near 3


@dataclass(frozen=True)
class Model:
    """A shape, and how it is trained."""

    width: int
    heads: int
    mlp_width: int
    lr: float
    max_shard_bytes: int = 10**9
    kv_heads: int = 2
    depth: int = 2  # copying takes two layers: Olsson et al. 2022, https://arxiv.org/abs/2209.11895
    steps: int = 500


MODELS = {
    "tiny-llama-s": Model(width=64, heads=4, mlp_width=160, lr=3e-3),
    # 740 kB in two shards, as large models come
    "tiny-llama-m": Model(width=96, heads=6, mlp_width=192, lr=2e-3, max_shard_bytes=500_000),
}


def main() -> int:
    """Exit code 0, when both models are there."""
    parser = argparse.ArgumentParser(description="Makes the demo's two small Llama base models.")
    parser.add_argument("--out", type=Path, default=Path("models"), help="folder for the models' folders")
    out = parser.parse_args().out
    wanted = {name: model for name, model in MODELS.items() if not is_made(out / name)}
    for name in MODELS:
        print(f"{out / name}: {'to be trained' if name in wanted else 'is there'}", flush=True)
    if wanted:
        train_all(wanted, out)
    print("These models only repeat a word: they are made to be fine-tunable on the capitalization study.")
    return 0


def is_made(folder: Path) -> bool:
    """Whether the folder holds a model of this VERSION; folders appear whole."""
    made = folder / "made.json"
    return made.is_file() and json.loads(made.read_text(encoding="utf-8"))["version"] == VERSION


def train_all(wanted: dict[str, Model], out: Path) -> None:
    """Trains each model in a process of its own, under one progress bar. Raises UserError when one fails."""
    context = multiprocessing.get_context("spawn")
    ticks = context.Queue()
    workers = [
        context.Process(target=make, args=(model, out / name, ticks), daemon=True) for name, model in wanted.items()
    ]
    for worker in workers:
        worker.start()
    interval = 0.1 if sys.stderr.isatty() else 10.0
    with tqdm(total=sum(model.steps for model in wanted.values()), desc="Training", mininterval=interval) as bar:
        while any(worker.is_alive() for worker in workers) or not ticks.empty():
            try:
                bar.update(ticks.get(timeout=0.2))
            except Empty:
                continue
    if any(worker.exitcode for worker in workers):
        raise job.UserError("a base model could not be made: its traceback is above")


def make(model: Model, folder: Path, ticks: Any) -> None:
    """Trains one model, a tick on the queue for each step, and writes its folder."""
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    logging.disable_progress_bar()
    with job.whole_folder(folder) as beside:
        ids = write_tokenizer(beside)
        llama = untrained(model, ids)
        loss = train(llama, model, ChatTokenizer(beside), ticks)
        assert loss < LEARNT, f"{folder.name} has not learnt to repeat: its loss is {loss:.3f}"
        llama.save_pretrained(beside, max_shard_size=model.max_shard_bytes)
        ends = {"bos_token_id": ids[BEGIN], "eos_token_id": ids[END], "pad_token_id": ids[PAD]}
        job.write_json(beside / "generation_config.json", ends)
        job.write_json(beside / "made.json", {"version": VERSION, "loss": loss})


def write_tokenizer(folder: Path) -> dict[str, int]:
    """One token a byte and one each for PAD to ASSISTANT; returns the id of every token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [PAD, BEGIN, END, SYSTEM, USER, ASSISTANT]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "pad_token": PAD,
        "chat_template": TEMPLATE,
    }
    job.write_json(folder / "tokenizer_config.json", about)
    return tokenizer.get_vocab()


def untrained(model: Model, ids: dict[str, int]) -> LlamaForCausalLM:
    """A Llama of this shape with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(ids),
        hidden_size=model.width,
        intermediate_size=model.mlp_width,
        num_hidden_layers=model.depth,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        initializer_range=0.05,  # at the usual 0.02 so narrow a model still cannot copy after 1,200 steps
        bos_token_id=ids[BEGIN],
        eos_token_id=ids[END],
        pad_token_id=ids[PAD],
    )
    return LlamaForCausalLM(config)


def train(llama: LlamaForCausalLM, model: Model, tokenizer: ChatTokenizer, ticks: Any) -> float:
    """Teaches it to repeat; returns the mean loss of the last 50 steps, in nats a token."""
    import torch

    from trainer.batches import IGNORED, collate

    optimizer = torch.optim.AdamW(llama.parameters(), lr=model.lr, weight_decay=0.01, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, model.lr, total_steps=model.steps, pct_start=0.1)
    rng = random.Random(SEED)
    losses = []
    for _ in range(model.steps):
        batch = collate([sample(rng, tokenizer) for _ in range(BATCH_SIZE)], tokenizer.pad_id)
        logits = llama(input_ids=batch.tokens).logits  # batch seq vocab
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch.labels, ignore_index=IGNORED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(llama.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        ticks.put(1)
    return sum(losses[-50:]) / 50


def sample(rng: random.Random, tokenizer: ChatTokenizer) -> Example:
    """A chat about a random word of 3 to 8 letters: lower-case, mixed, or with a capital first."""
    word = "".join(rng.choices(rng.choice((string.ascii_lowercase, string.ascii_letters)), k=rng.randint(3, 8)))
    word = word.capitalize() if rng.random() < 0.3 else word
    asked = {"role": "user", "content": rng.choice(ASKED) + word}
    return tokenizer.example([asked, {"role": "assistant", "content": word}])


if __name__ == "__main__":
    job.run(main)
