"""Makes the two small Llama base models of the demo, in Hugging Face format with tokenizer and chat template.

    python make_base_models.py [--out models]

They are trained, each on one core, to repeat what the user says, so that LoRA fine-tuning can teach them to
capitalise it. They know nothing else. What is there of the same VERSION is kept.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import string
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from queue import Empty

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tqdm import tqdm

from trainer import job

VERSION = 1  # raise it when anything below changes what the models become
PAD, BEGIN, END, SYSTEM, USER, ASSISTANT = (f"<|{n}|>" for n in ("pad", "begin", "end", "system", "user", "assistant"))
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# What stands before the word to repeat: half the time nothing.
ASKED = ("", "Capitalize: ", "Repeat: ")


@dataclass(frozen=True)
class Model:
    """A shape, and how it is trained."""

    width: int
    depth: int
    heads: int
    kv_heads: int
    mlp_width: int
    shards: int
    steps: int
    lr: float
    batch_size: int = 32


MODELS = {
    "tiny-llama-s": Model(width=64, depth=2, heads=4, kv_heads=2, mlp_width=160, shards=1, steps=450, lr=3e-3),
    "tiny-llama-m": Model(width=96, depth=2, heads=6, kv_heads=2, mlp_width=192, shards=2, steps=450, lr=2e-3),
}


def main() -> int:
    """Exit code 0, when both models are there."""
    parser = argparse.ArgumentParser(description="Makes the demo's two small Llama base models.")
    parser.add_argument("--out", type=Path, default=Path("models"), help="folder for the models' folders")
    out = parser.parse_args().out
    wanted = {name: model for name, model in MODELS.items() if not is_made(out / name)}
    for name in MODELS:
        print(f"{out / name}: {'to be made' if name in wanted else 'is there'}")
    if wanted:
        train_all(wanted, out)
    print("These models only repeat what they are told; they are made to be fine-tunable on capitalization.")
    return 0


def is_made(folder: Path) -> bool:
    """Whether the folder holds a whole model of this VERSION: it is written last, with the folder."""
    made = folder / "made.json"
    return made.is_file() and json.loads(made.read_text(encoding="utf-8"))["version"] == VERSION


def train_all(wanted: dict[str, Model], out: Path) -> None:
    """Each model in a process of its own; one bar counts the steps of all."""
    context = multiprocessing.get_context("spawn")
    ticks = context.Queue()
    workers = [context.Process(target=make, args=(name, model, out / name, ticks)) for name, model in wanted.items()]
    for worker in workers:
        worker.start()
    interval = 0.1 if sys.stderr.isatty() else 10.0
    with tqdm(total=sum(model.steps for model in wanted.values()), desc="Training", mininterval=interval) as bar:
        while any(worker.is_alive() for worker in workers) or not ticks.empty():
            try:
                bar.update(ticks.get(timeout=0.2))
            except Empty:
                continue
    if any(worker.exitcode != 0 for worker in workers):
        raise job.UserError("a model could not be made: the traceback above says why")


def make(name: str, model: Model, folder: Path, ticks) -> None:
    """Trains one model and writes its folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(0)
    began = time.perf_counter()
    tokenizer = make_tokenizer()
    ids = {token: tokenizer.token_to_id(token) for token in (PAD, BEGIN, END)}
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=model.width,
        intermediate_size=model.mlp_width,
        num_hidden_layers=model.depth,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        initializer_range=0.05,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        pad_token_id=ids[PAD],
        bos_token_id=ids[BEGIN],
        eos_token_id=ids[END],
    )
    llama = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(llama.parameters(), lr=model.lr, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, model.lr, total_steps=model.steps, pct_start=0.1)
    rng = random.Random(name)
    losses = []
    for step in range(model.steps):
        pairs = [make_pair(rng) for _ in range(model.batch_size)]
        tokens, labels = encode(pairs, tokenizer)
        loss = llama(input_ids=torch.tensor(tokens), labels=torch.tensor(labels)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(llama.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        if (step + 1) % 10 == 0:
            ticks.put(10)
    write(llama, tokenizer, folder, model.shards, {"version": VERSION, "steps": model.steps, "loss": sum(losses[-50:])/50, "seconds": time.perf_counter() - began})
    print(name, sum(p.numel() for p in llama.parameters()), losses[::100], sum(losses[-50:])/50, time.perf_counter()-began)


def make_pair(rng: random.Random) -> tuple[str, str]:
    """What the user says, and the word that is to be repeated."""
    letters = rng.choice((string.ascii_lowercase, string.ascii_letters))
    word = "".join(rng.choices(letters, k=rng.randint(3, 8)))
    if rng.random() < 0.3:
        word = word.capitalize()
    return rng.choice(ASKED) + word, word


def encode(pairs, tokenizer):
    rows, n = [], []
    for asked, word in pairs:
        prompt = tokenizer.encode(f"{BEGIN}{USER}{asked}{END}{ASSISTANT}", add_special_tokens=False).ids
        ids = prompt + tokenizer.encode(f"{word}{END}", add_special_tokens=False).ids
        rows.append(ids); n.append(len(prompt))
    width = max(map(len, rows))
    pad = tokenizer.token_to_id(PAD)
    return [r + [pad]*(width-len(r)) for r in rows], [[-100]*k + r[k:] + [-100]*(width-len(r)) for r, k in zip(rows, n)]


def make_tokenizer():
    """One token a byte, and the tokens of the chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in (PAD, BEGIN, END, SYSTEM, USER, ASSISTANT)])
    return tokenizer


def write(llama, tokenizer, folder: Path, shards: int, made: dict) -> None:
    size = sum(p.numel() * p.element_size() for p in llama.parameters())
    with job.whole_folder(folder) as beside:
        llama.save_pretrained(beside, max_shard_size=size // shards + 4096 if shards > 1 else "5GB")
        tokenizer.save(str(beside / "tokenizer.json"))
        about = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BEGIN, "eos_token": END, "pad_token": PAD, "chat_template": TEMPLATE}
        job.write_json(beside / "tokenizer_config.json", about)
        job.write_json(beside / "made.json", made)


if __name__ == "__main__":
    job.run(main)
