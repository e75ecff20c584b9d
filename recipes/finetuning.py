"""LoRA fine-tuning, made of torchtune's building blocks: the whole loop of every lora_finetune_*.py.

The YAML beside a recipe explains its settings; config.yaml gives all of them. Into --out go
    metrics.jsonl        an event a line: start, step, validation, checkpoint, end. A run that goes on appends a start
                         line and repeats the steps since its checkpoint: the last line of a step is the one that counts
    checkpoints/step_N/  all it takes to go on bit for bit, of the last checkpoint only
    best/                with validation: the adapter of the lowest loss so far, and validation.json with that loss
    adapter/             the trained adapter as PEFT stores it
    guards.json          what the validity guards saw
    deviation.json       where memory ran out: the smaller micro batch that the next start takes
    DONE                 {"step": N}, last; a run that finds it does nothing

Exit code 75 asks to be started again. After SIGUSR1 or SIGTERM the run finishes its step, saves and exits with it; one
that has made no step yet makes one first, so that each start gets further. Only a signal during the validation with
which a start began ends it with 1: it would never get past that. Out of memory, the run halves its micro batch and
exits with 75; a micro batch of 1 cannot be halved and ends it with 1. Where processes divide the model, the first that
runs out does this for all, and a thread ends the others inside their passes (trainer/watch.py).
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
import yaml
from lines import micro_batches, read_data, validation_hash
from lora_models import load_model, read_shape, save_adapter
from schedule import make_schedule
from settings import FREE, checked
from torchtune import training, utils
from torchtune.modules import TransformerSelfAttentionLayer
from torchtune.modules.loss import CEWithChunkedOutputLoss
from torchtune.modules.peft import get_adapter_params
from tqdm import tqdm

from trainer import job
from trainer.batches import IGNORED, Batch, data_order, seed_of
from trainer.chat import ChatTokenizer, Example
from trainer.checkpoints import append_event, last_step, load_checkpoint, restore, save_checkpoint
from trainer.guards import SAMPLE, Guards, Outcome, budget_met
from trainer.job import REQUEUE, Stop, UserError
from trainer.micro import as_asked
from trainer.ranks import Ranks, join
from trainer.rows import file_hash

log = utils.get_logger("DEBUG")
LESS_MEMORY = (
    "lower max_seq_len, set activation_checkpointing, chunked_loss or quantize_base to true, or take a larger device"
)


def main(recipe: Path, stop: Stop, *, distributed: bool = False) -> int:
    """Exit code: 0 when the adapter is there, 75 when the run is to be started again."""
    parser = argparse.ArgumentParser(description="LoRA fine-tuning. The YAML beside the recipe explains the settings.")
    parser.add_argument("--config", type=Path, required=True, help="YAML file with every setting")
    parser.add_argument("--out", type=Path, default=Path(), help="folder to write to")
    arguments = parser.parse_args()
    if (arguments.out / "DONE").exists():
        print(f"{arguments.out / 'DONE'} is there: nothing to do")
        return 0
    config = checked(job.read_config(arguments.config, recipe.with_suffix(".yaml")))
    ranks = join(config.device) if distributed else Ranks(job.pick_device(config.device))
    log.disabled = not ranks.writes
    log.info(f"Running {recipe.stem} with resolved config:\n\n{yaml.safe_dump(vars(config), sort_keys=True)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    try:
        run = Finetuning(config, arguments.out, ranks, recipe.stem)
        return 0 if run.train(stop) else REQUEUE
    except (RuntimeError, MemoryError) as error:
        ranks.heed()
        if not job.is_out_of_memory(error):
            raise
        raise UserError(
            f"out of memory beside the forward and backward passes ({error}): a smaller micro batch would not help; "
            "set quantize_base to true, or take a device with more memory"
        ) from error
    finally:
        ranks.leave()


class OutOfMemory(Exception):
    """Memory ran out in a forward or backward pass, of this process or another."""


class Finetuning:
    """Model, samples, optimizer and how many steps are done; made as the last checkpoint left them."""

    def __init__(self, config: SimpleNamespace, out: Path, ranks: Ranks, recipe: str):
        self.config, self.out, self.ranks, self.device = config, out, ranks, ranks.device
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # docs.pytorch.org, notes on randomness
            torch.use_deterministic_algorithms(True)
        self.micro = as_asked(config, ranks, out)
        model, dataset = job.folder_of(config, "model"), job.folder_of(config, "dataset")
        identity = {key: value for key, value in vars(config).items() if key not in FREE}
        self.identity = {**identity, "dataset_sha256": file_hash(dataset)}
        self.shape = read_shape(model, config.max_seq_len)
        self._read_data(ChatTokenizer(model), dataset)
        self._make_model(model)
        self.optimizer = torch.optim.AdamW(
            self.adapter.values(), lr=config.lr, weight_decay=config.weight_decay, fused=True
        )
        self.step, self.validated, self.best_loss = 0, 0, math.inf
        self._resume()
        self.began_at, self.recorded = self.step, last_step(out / "metrics.jsonl")
        self.schedule = make_schedule(self.optimizer, config, self.total_steps, self.step)
        self.n_lines = 0  # of this start
        # Process 0 looks; at the base model in a sample, since hashing all of 8 billion weights takes minutes.
        self.guards = Guards(
            self.model, self.optimizer, out, self.step, steps=config.guard_steps if ranks.writes else 0,
            settle=max(0, config.warmup_steps - self.step), frozen_sample=SAMPLE,
        )  # fmt: skip
        n_trainable = sum(p.numel() for p in self.adapter.values())
        self._record(
            "start", recipe=recipe, started=job.started(), **job.describe_device(self.device),
            world_size=ranks.world_size, n_params=sum(p.numel() for p in self.model.parameters()) - n_trainable,
            n_trainable=n_trainable, n_samples=len(self.samples), n_truncated=self.n_truncated,
            n_packs=len(self.lines) if config.packed else None, batch_size=config.batch_size,
            micro_batch_size=self.micro.size, deviation=self.micro.deviation, steps_per_epoch=self.steps_per_epoch,
            total_steps=self.total_steps, step=self.step, train_sha256=self.identity["dataset_sha256"],
            val_sha256=validation_hash(self.identity["dataset_sha256"], config.val_split),
            packages={name: version(name) for name in ("torch", "torchtune", "torchao")}, setup_s=job.age_s(),
        )  # fmt: skip

    def train(self, stop: Stop) -> bool:
        """All steps that are left, then the adapter and DONE; False if the run is to be started again.

        Raises UserError for a loss that is no number, and where starting again would not help.
        """
        try:
            return self._train(stop)
        except OutOfMemory as error:
            if self.mesh:
                self._end_all(error)
            self._take_less_memory(error)
            return False

    def _train(self, stop: Stop) -> bool:
        config, train_s, checkpoint_s = self.config, 0.0, 0.0
        if self._validation_is_due() and not self._validate(stop):
            raise UserError(
                f"a signal ended the validation after step {self.step}, with which this start began: give the job more "
                "time, or raise micro_batch_size; the checkpoint is as it was"
            )
        while self.step < self.total_steps:
            epoch, first = divmod(self.step, self.steps_per_epoch)
            last = min(self.steps_per_epoch, self.total_steps - epoch * self.steps_per_epoch)
            order = data_order(len(self.lines), config.seed, epoch)
            with self._progress(first) as bar:
                for i in range(first, last):
                    began = time.perf_counter()
                    batch = [self.lines[j] for j in order[i * config.batch_size : (i + 1) * config.batch_size]]
                    done, stopped = self._optimizer_step(batch, stop)
                    self.step += 1
                    seconds = time.perf_counter() - began
                    train_s += seconds
                    bar.set_description(f"{epoch + 1}|{self.step}|Loss: {done['loss']}", refresh=False)
                    bar.update(1)
                    if self.step % config.log_every_n_steps == 0 or self.step == self.total_steps:
                        done |= {"tokens_per_s": done["tokens"] / seconds, "seconds": seconds}
                        self._record("step", step=self.step, epoch=epoch + 1, **done, **job.peak_memory(self.device))
                    stopped = stopped and self.step < self.total_steps
                    if not stopped and self._validation_is_due():
                        stopped = not self._validate(stop)
                    if stopped or self._checkpoint_is_due(epoch_ends=i + 1 == self.steps_per_epoch):
                        checkpoint_s += self._save_checkpoint()
                    if stopped:
                        log.info(f"A signal came: stopped after step {self.step}, start again to go on.")
                        return False
        if self.ranks.writes:
            with job.whole_folder(self.out / "adapter") as folder:
                save_adapter(folder, self.adapter, self.shape, config)
            self.guards.finish(self._budget())
            memory = job.peak_memory(self.device)
            self._record("end", step=self.step, ended=job.now(), train_s=train_s, checkpoint_s=checkpoint_s, **memory)
            job.write_json(self.out / "DONE", {"step": self.step})
        self.ranks.wait()
        return True

    def _optimizer_step(self, lines: list[list[Example]], stop: Stop) -> tuple[dict[str, Any], bool]:
        """One step on a batch, and whether a signal came to any process.

        The loss is the mean over all label tokens of the batch. Dropout follows from seed, step and process, so that
        no state of it has to be kept. Raises OutOfMemory in every process when one has too little.
        """
        torch.manual_seed(seed_of(self.config.seed, self.step, self.ranks.rank, 1))
        parts = micro_batches(lines, self.micro.size, self.pad_id, self.config)
        label_tokens = sum(part.label_tokens for part in parts)
        loss, stopped = self._together(
            lambda: self._gradients(self.ranks.share(parts), label_tokens), stop, f"in step {self.step + 1}"
        )
        if not math.isfinite(loss):
            raise UserError(f"the loss is {loss} at step {self.step + 1}: lower lr, clip gradients or use fp32")
        self.ranks.add_up(self.adapter.values())
        clip, lr = self.config.clip_grad_norm, self.schedule.get_last_lr()[0]
        grad_norm = {}
        if clip is not None:
            grad_norm["grad_norm"] = torch.nn.utils.clip_grad_norm_(self.adapter.values(), clip).item()
        with self.guards.step(self.step):
            self.optimizer.step()
        self.n_lines += len(lines)
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        done = {
            "loss": loss,
            "lr": lr,
            **grad_norm,
            "tokens": sum(len(sample.ids) for line in lines for sample in line),
            "padded_tokens": sum(part.tokens.numel() for part in parts),
            "longest_pass_tokens": max(part.tokens.numel() for part in parts),
            "label_tokens": label_tokens,
            "samples": sum(map(len, lines)),
        }
        return done, stopped

    def _together(self, work: Callable[[], float], stop: Stop, when: str) -> tuple[float, bool]:
        """What `work` returns, added up over the processes, and whether a signal came to any of them.

        Raises OutOfMemory, which says `when`, where one has too little memory: in every process if each holds the whole
        model, else in that one alone, since the others wait for it inside their passes.
        """
        if self.mesh:
            self.ranks.wait()  # what came before is written, so that one can act for all
        value, failed = job.within_memory(work)
        if failed and self.mesh:
            raise OutOfMemory(when)
        value, stops, failures = self.ranks.total(value, stop.asked, failed)
        if failures:
            self.optimizer.zero_grad(set_to_none=True)
            raise OutOfMemory(when)
        return value, stops > 0

    def _gradients(self, parts: list[Batch], label_tokens: int) -> float:
        """Forward and backward passes; this process's part of the loss."""
        loss = torch.zeros((), device=self.device)
        for part in parts:
            partial = self._loss(part) / label_tokens
            partial.backward()
            loss += partial.detach()
        return loss.item()

    def _loss(self, part: Batch) -> torch.Tensor:
        """The sum of the losses of a part's label tokens, in nats."""
        label_tokens, part = part.label_tokens, part.to(self.device)
        logits = self.model(part.tokens, mask=part.mask, input_pos=part.positions)
        if self.config.chunked_loss:
            return self.loss(logits, part.labels) * label_tokens
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), part.labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )

    @torch.no_grad()
    def _validate(self, stop: Stop) -> bool:
        """Records the mean loss of the validation split and keeps the best adapter; False if a signal came.

        Raises OutOfMemory in every process when one has too little.
        """
        began, loss, size = time.perf_counter(), 0.0, self.ranks.world_size
        parts = micro_batches(self.val_lines, self.micro.size, self.pad_id, self.config)
        label_tokens = sum(part.label_tokens for part in parts)
        self.model.eval()
        for i in range(0, len(parts), size):
            summed, stopped = self._together(
                lambda few=parts[i : i + size]: self._part_of(few), stop, f"in the validation after step {self.step}"
            )
            if stopped:
                self.model.train()
                return False
            loss += summed / label_tokens
        self.model.train()
        self.validated, is_best = self.step, loss < self.best_loss
        if is_best:
            self.best_loss = loss
            self._save_best()
        log.info(f"Validation loss after step {self.step}: {loss}")
        counts = {"label_tokens": label_tokens, "samples": sum(map(len, self.val_lines))}
        seconds = time.perf_counter() - began
        self._record("validation", step=self.step, loss=loss, best=is_best, **counts, seconds=seconds)
        return True

    def _part_of(self, parts: list[Batch]) -> float:
        """The loss of this process's part. Without one it computes another's: a divided model needs all in a pass."""
        mine = self.ranks.share(parts)
        loss = self._loss((mine or parts)[0]).item()
        return loss if mine else 0.0

    def _validation_is_due(self) -> bool:
        every = self.config.run_val_every_n_steps
        due = self.step == self.total_steps or (every and self.step % every == 0)
        return bool(self.config.val_split and due and self.validated < self.step)

    def _checkpoint_is_due(self, *, epoch_ends: bool) -> bool:
        """Also after the last step that an attempt killed before had recorded: nothing is to be lost twice."""
        every = self.config.save_every_n_steps
        return epoch_ends or self.step == self.recorded or bool(every and self.step % every == 0)

    def _take_less_memory(self, error: OutOfMemory) -> None:
        """Saves what was done and notes a smaller micro batch for the next start; UserError where there is none."""
        if self.step > self.began_at:
            self._save_checkpoint()
        log.warning(self.micro.take_less(self.out, self.ranks, str(error), LESS_MEMORY))

    def _end_all(self, error: OutOfMemory) -> NoReturn:
        """`_take_less_memory` by the first process that ran out, then the end of all: the others wait inside a pass."""
        code = REQUEUE
        print(file=sys.stderr)  # the bar of process 0 is left as it is
        try:
            with self.ranks.instead_of_all() as self.ranks:
                log.disabled = False
                self._take_less_memory(error)
        except UserError as mistake:
            print(f"error: {mistake}", file=sys.stderr)
            code = 1
        self.ranks.end_all(code)

    def _budget(self) -> Outcome:
        """Whether it trained on as many samples, or packs, as planned."""
        config, lines = self.config, self.began_at * self.config.batch_size + self.n_lines
        planned, epochs = self.total_steps * config.batch_size, self.step / self.steps_per_epoch
        return budget_met(lines, planned, epochs, config.epochs, "packs" if config.packed else "samples")

    def _progress(self, first: int) -> tqdm:
        every_s = 0.1 if sys.stderr.isatty() else 10.0  # a log file gets few lines
        return tqdm(total=self.steps_per_epoch, initial=first, mininterval=every_s, disable=not self.ranks.writes)

    def _read_data(self, tokenizer: ChatTokenizer, dataset: Path) -> None:
        """The samples and lines to train on, those to validate on, and how many steps they make."""
        data = read_data(dataset, tokenizer, self.config, self.shape.vocab_size)
        self.pad_id, (self.samples, self.lines, self.n_truncated) = tokenizer.pad_id, data.train
        self.val_lines, self.steps_per_epoch, self.total_steps = data.val_lines, data.steps_per_epoch, data.total_steps

    def _make_model(self, folder: Path) -> None:
        config = self.config
        self.mesh = self.ranks.mesh() if config.shard_model else None
        self.model = load_model(folder, self.shape, config, self.device, self.mesh)
        self.adapter = get_adapter_params(self.model)
        self.loss = CEWithChunkedOutputLoss(ignore_index=IGNORED)
        if config.chunked_loss:
            self.model.set_num_output_chunks(self.loss.num_output_chunks)
        if config.compile:
            training.compile_model(self.model, verbose=False)
        if config.activation_checkpointing:  # each layer's, dropout's state kept
            training.set_activation_checkpointing(self.model, auto_wrap_policy={TransformerSelfAttentionLayer})
        if self.device.type == "cuda":
            training.log_memory_stats(training.get_memory_stats(device=self.device))

    def _save_checkpoint(self) -> float:
        """Seconds it took."""
        log.info("Starting checkpoint save...")
        began = time.perf_counter()
        if self.ranks.writes:
            state = {
                "step": self.step,
                "validated": self.validated,
                "best_loss": self.best_loss,
                "adapter": {name: p.detach().cpu() for name, p in self.adapter.items()},
                "optimizer": self.optimizer.state_dict(),
                "identity": self.identity,
            }
            save_checkpoint(self.out / "checkpoints", state)
        self.ranks.wait()
        seconds = time.perf_counter() - began
        log.info(f"Checkpoint saved in {seconds:.2f} seconds.")
        self._record("checkpoint", step=self.step, seconds=seconds)
        return seconds

    def _resume(self) -> None:
        state = load_checkpoint(self.out / "checkpoints", self.identity)
        if state is None:
            return
        restore(state, self.adapter, self.optimizer)
        self.step, self.validated, self.best_loss = state["step"], state["validated"], state["best_loss"]
        log.info(f"Going on after step {self.step}.")

    def _save_best(self) -> None:
        if self.ranks.writes:
            with job.whole_folder(self.out / "best") as folder:
                save_adapter(folder, self.adapter, self.shape, self.config)
                job.write_json(folder / "validation.json", {"step": self.step, "loss": self.best_loss})

    def _record(self, event: str, **values: Any) -> None:
        if self.ranks.writes:
            append_event(self.out / "metrics.jsonl", event, **values)
