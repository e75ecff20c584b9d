"""LoRA fine-tuning of a Llama on one device, made of torchtune's building blocks.

    python lora_finetune_single_device.py --config config.yaml [--out .]

lora_finetune_single_device.yaml explains the settings; config.yaml gives all of them. Into --out go
    metrics.jsonl        an event a line: start, step, checkpoint, end. A run that goes on appends a start line and
                         repeats the steps since its checkpoint: the last line of a step is the one that counts
    checkpoints/step_N/  all it takes to go on bit for bit, of the last checkpoint only
    adapter/             the trained adapter as PEFT stores it
    DONE                 {"step": N}, last; a run that finds it does nothing
SIGUSR1 or SIGTERM: finish the step, save a checkpoint, exit with 75, which asks to be started again.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import signal
import sys
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from trainer import job

# isort: split
import torch
import yaml
from llama_lora import check_targets, llama_shape, load_model, save_adapter
from torch.optim.lr_scheduler import LambdaLR
from torchtune import training, utils
from torchtune.modules.loss import CEWithChunkedOutputLoss
from torchtune.modules.peft import get_adapter_params
from torchtune.training.lr_schedulers import get_cosine_schedule_with_warmup
from tqdm import tqdm

from trainer.batches import IGNORED, collate, data_order
from trainer.chat import ChatTokenizer, Example
from trainer.job import UserError
from trainer.rows import file_hash, read_rows

RECIPE = Path(__file__).stem
REQUEUE = 75  # EX_TEMPFAIL of sysexits.h
# Settings that a resumed run may change: they do not reach the weights.
FREE = {"log_every_n_steps", "save_every_n_steps", "device"}
log = utils.get_logger("DEBUG")


def main() -> int:
    """Exit code: 0 when the adapter is there, 75 when a signal came first."""
    parser = argparse.ArgumentParser(description="LoRA fine-tuning of a Llama on one device.")
    parser.add_argument("--config", type=Path, required=True, help="YAML file with every setting")
    parser.add_argument("--out", type=Path, default=Path(), help="folder to write to")
    arguments = parser.parse_args()
    if (arguments.out / "DONE").exists():
        print(f"{arguments.out / 'DONE'} is there: nothing to do")
        return 0
    stop = Stop()
    config = checked(job.read_config(arguments.config, Path(__file__).with_suffix(".yaml")))
    log.info(f"Running {RECIPE} with resolved config:\n\n{yaml.safe_dump(vars(config), sort_keys=True)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    run = Finetuning(config, arguments.out)
    return 0 if run.train(stop) else REQUEUE


class Stop:
    """Remembers that SIGUSR1 or SIGTERM came."""

    def __init__(self):
        self.asked = False
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, *_):
        self.asked = True


class Finetuning:
    """Model, samples, optimizer and how many steps are done; made as the last checkpoint left them."""

    def __init__(self, config: SimpleNamespace, out: Path):
        self.config, self.out, self.step = config, out, 0
        self.device = job.pick_device(config.device)
        model, dataset = job.folder_of(config, "model"), job.folder_of(config, "dataset")
        self.identity = {key: value for key, value in vars(config).items() if key not in FREE}
        self.identity["dataset_sha256"] = file_hash(dataset)
        training.set_seed(config.seed)
        self.shape = llama_shape(model, config.max_seq_len)
        tokenizer = ChatTokenizer(model)
        samples = read_samples(dataset, tokenizer, config, self.shape["vocab_size"])
        n_truncated = sum(len(sample.ids) > config.max_seq_len for sample in samples)
        if n_truncated:
            log.warning(f"{n_truncated} of {len(samples)} samples are cut to max_seq_len {config.max_seq_len}")
        self.samples = [Example(sample.ids[: config.max_seq_len], sample.n_prompt) for sample in samples]
        self.pad_id = tokenizer.pad_id
        self.steps_per_epoch = len(self.samples) // config.batch_size
        if not self.steps_per_epoch:
            raise UserError(f"batch_size {config.batch_size} is more than the {len(self.samples)} samples: lower it")
        self.total_steps = min(self.steps_per_epoch * config.epochs, config.max_steps or sys.maxsize)
        if config.warmup_steps >= self.total_steps:
            log.warning(f"lr stays below its value: warmup_steps {config.warmup_steps} of {self.total_steps} steps")
        self.model = load_model(model, self.shape, config, self.device)
        self.adapter = get_adapter_params(self.model)
        if self.device.type == "cuda":
            training.log_memory_stats(training.get_memory_stats(device=self.device))
        self.loss = CEWithChunkedOutputLoss(ignore_index=IGNORED)
        self.model.set_num_output_chunks(self.loss.num_output_chunks)
        self.optimizer = torch.optim.AdamW(
            self.adapter.values(), lr=config.lr, weight_decay=config.weight_decay, fused=True
        )
        self._resume()
        self.schedule = make_schedule(self.optimizer, config, self.total_steps, self.step)
        n_trainable = sum(p.numel() for p in self.adapter.values())
        self._record(
            "start",
            recipe=RECIPE,
            started=job.started(),
            **job.describe_device(self.device),
            n_params=sum(p.numel() for p in self.model.parameters()) - n_trainable,
            n_trainable=n_trainable,
            n_samples=len(self.samples),
            n_truncated=n_truncated,
            steps_per_epoch=self.steps_per_epoch,
            total_steps=self.total_steps,
            step=self.step,
            packages={name: version(name) for name in ("torch", "torchtune")},
            setup_s=job.age_s(),
        )

    def train(self, stop: Stop) -> bool:
        """All steps that are left, then the adapter and DONE; False if a signal ended it with a checkpoint before."""
        config, train_s, checkpoint_s = self.config, 0.0, 0.0
        while self.step < self.total_steps:
            epoch, first = divmod(self.step, self.steps_per_epoch)
            last = min(self.steps_per_epoch, self.total_steps - epoch * self.steps_per_epoch)
            order = data_order(len(self.samples), config.seed, epoch)
            # A log file gets a line every ten seconds, a terminal ten a second.
            interval = 0.1 if sys.stderr.isatty() else 10.0
            with tqdm(total=self.steps_per_epoch, initial=first, mininterval=interval) as bar:
                for i in range(first, last):
                    began = time.perf_counter()
                    batch = [self.samples[j] for j in order[i * config.batch_size : (i + 1) * config.batch_size]]
                    done = self._optimizer_step(batch)
                    self.step += 1
                    seconds = time.perf_counter() - began
                    train_s += seconds
                    bar.set_description(f"{epoch + 1}|{self.step}|Loss: {done['loss']}", refresh=False)
                    bar.update(1)
                    if self.step % config.log_every_n_steps == 0 or self.step == self.total_steps:
                        memory = job.peak_memory(self.device)
                        self._record("step", step=self.step, epoch=epoch + 1, **done, seconds=seconds, **memory)
                    stopped = stop.asked and self.step < self.total_steps
                    every_n = config.save_every_n_steps and self.step % config.save_every_n_steps == 0
                    if every_n or stopped or i + 1 == self.steps_per_epoch:
                        checkpoint_s += self._save_checkpoint()
                    if stopped:
                        log.info(f"A signal came: stopped after step {self.step}, start again to go on.")
                        return False
        save_adapter(self.out / "adapter", self.adapter, self.shape, config)
        memory = job.peak_memory(self.device)
        self._record("end", step=self.step, ended=job.now(), train_s=train_s, checkpoint_s=checkpoint_s, **memory)
        job.write_json(self.out / "DONE", {"step": self.step})
        return True

    def _optimizer_step(self, batch: list[Example]) -> dict[str, Any]:
        """One step on `batch`, micro batch by micro batch; the loss is the mean over all label tokens of the batch."""
        micro = self.config.micro_batch_size or self.config.batch_size
        parts = [collate(batch[i : i + micro], self.pad_id) for i in range(0, len(batch), micro)]
        label_tokens = sum(part.label_tokens for part in parts)
        loss = torch.zeros((), device=self.device)
        for part in parts:
            logits = self.model(part.tokens.to(self.device))
            partial = self.loss(logits, part.labels.to(self.device)) * (part.label_tokens / label_tokens)
            del logits  # else they are still there at the peak of the backward pass
            partial.backward()
            loss += partial.detach()
        if not math.isfinite(loss.item()):
            raise UserError(f"the loss is {loss.item()} at step {self.step + 1}: lower lr, clip gradients or use fp32")
        clip, lr = self.config.clip_grad_norm, self.schedule.get_last_lr()[0]
        grad_norm = {}
        if clip is not None:
            grad_norm["grad_norm"] = torch.nn.utils.clip_grad_norm_(self.adapter.values(), clip).item()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        return {
            "loss": loss.item(),
            "lr": lr,
            **grad_norm,
            "tokens": sum(len(sample.ids) for sample in batch),
            "padded_tokens": sum(part.tokens.numel() for part in parts),
            "longest_pass_tokens": max(part.tokens.numel() for part in parts),
            "label_tokens": label_tokens,
            "samples": len(batch),
        }

    def _save_checkpoint(self) -> float:
        """Seconds it took."""
        log.info("Starting checkpoint save...")
        began = time.perf_counter()
        checkpoints = self.out / "checkpoints"
        folder = checkpoints / f"step_{self.step}"
        with job.whole_folder(folder) as beside:
            state = {
                "step": self.step,
                "adapter": {name: p.detach().cpu() for name, p in self.adapter.items()},
                "optimizer": self.optimizer.state_dict(),
                "rng": torch.get_rng_state(),
                "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
                "identity": self.identity,
            }
            torch.save(state, beside / "state.pt")
        for older in checkpoints.iterdir():
            if older != folder:
                shutil.rmtree(older)
        seconds = time.perf_counter() - began
        log.info(f"Checkpoint saved in {seconds:.2f} seconds.")
        self._record("checkpoint", step=self.step, seconds=seconds)
        return seconds

    def _resume(self) -> None:
        folders = (self.out / "checkpoints").glob("step_*")
        last = max(folders, key=lambda folder: int(folder.name.removeprefix("step_")), default=None)
        if last is None:
            return
        state = torch.load(last / "state.pt", map_location="cpu", weights_only=True)
        if changed := [key for key, value in self.identity.items() if state["identity"].get(key) != value]:
            raise UserError(f"{last} was made with another {', '.join(changed)}: put it back, or remove {last.parent}")
        self.model.load_state_dict(state["adapter"], strict=False)
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        self.step = state["step"]
        log.info(f"Going on after step {self.step}.")

    def _record(self, event: str, **values: Any) -> None:
        with (self.out / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event, **values}) + "\n")


def checked(config: SimpleNamespace) -> SimpleNamespace:
    """The settings with lora_alpha filled in. Raises UserError for values that cannot be trained with."""
    counts = ["lora_rank", "batch_size", "micro_batch_size", "max_seq_len", "epochs", "max_steps"]
    job.check_numbers(config, [*counts, "log_every_n_steps", "save_every_n_steps"], int, 1)
    job.check_numbers(config, ["seed", "warmup_steps"], int, 0)
    job.check_numbers(config, ["lora_alpha", "lora_dropout", "lr", "weight_decay", "clip_grad_norm"], float, 0)
    job.check_choice(config, "dtype", ["bf16", "fp32"])
    job.check_choice(config, "lr_schedule", ["cosine", "constant"])
    check_targets(config.lora_targets)
    batch, micro = config.batch_size, config.micro_batch_size or config.batch_size
    if batch % micro:
        divisors = [str(n) for n in range(1, batch + 1) if batch % n == 0]
        raise UserError(f"micro_batch_size {micro} does not divide batch_size {batch}: take {', '.join(divisors)}")
    alpha = 2 * config.lora_rank if config.lora_alpha is None else config.lora_alpha
    return SimpleNamespace(**vars(config) | {"lora_alpha": alpha})


def read_samples(dataset: Path, tokenizer: ChatTokenizer, config: SimpleNamespace, vocab_size: int) -> list[Example]:
    """The training samples at their full length. Raises UserError for one that the model cannot learn from."""
    samples = [tokenizer.row_example(row, config.system_prompt, config.prompt) for row in read_rows(dataset, "train")]
    for i, sample in enumerate(samples):
        if sample.n_prompt >= config.max_seq_len:
            raise UserError(
                f"the prompt of training row {i} has {sample.n_prompt} tokens, max_seq_len is {config.max_seq_len}: "
                "nothing would be left to learn; raise max_seq_len or remove the row"
            )
        if max(sample.ids) >= vocab_size:
            raise UserError(
                f"training row {i} has token {max(sample.ids)} but the model knows only {vocab_size}: "
                "the tokenizer is another model's; download the model again"
            )
    return samples


def make_schedule(optimizer: torch.optim.Optimizer, config: SimpleNamespace, total_steps: int, step: int) -> LambdaLR:
    """The learning rate after `step` steps and on: a rise over warmup_steps, then a cosine to 0 or constant."""
    if config.lr_schedule == "cosine":
        return get_cosine_schedule_with_warmup(optimizer, config.warmup_steps, total_steps, last_epoch=step - 1)
    rise = config.warmup_steps
    return LambdaLR(optimizer, lambda done: done / rise if done < rise else 1.0, last_epoch=step - 1)


if __name__ == "__main__":
    job.run(main)
