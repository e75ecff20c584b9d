"""Trains a language model of the trainer's own on token files: the whole loop, read top to bottom.

    python -m trainer.train --config config.yaml [--out .]        one process
    torchrun --nproc-per-node 2 -m trainer.train --config ...     several, each a part of every batch

train.yaml explains the settings; config.yaml gives all of them. Into --out go
    metrics.jsonl        an event a line: start, step, validation, checkpoint, end; the last line of a step counts
    checkpoints/step_N/  all it takes to go on bit for bit
    guards.json          what the validity guards saw
    model/               the trained weights and their shape: export.py and sample.py read it
    DONE                 {"step": N}, last; a run that finds it does nothing, unless max_steps is more by now

Exit code 75 asks to be started again: after SIGUSR1, SIGTERM or Ctrl-C, which let the step end and save, and out of
memory, with half the micro batch noted in deviation.json. 1: starting again would not help; the last line says why.
torchrun makes a 1 of every code; srun and chiplog's jobs do not.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from trainer import job

if __name__ == "__main__":
    STOP = job.Stop()

# isort: split
import torch
from torch import Tensor
from tqdm import tqdm

from trainer.batches import seed_of
from trainer.checkpoints import append_event, last_step, load_checkpoint, save_checkpoint, save_model
from trainer.conflicts import conflict
from trainer.guards import Guards, budget_met, one_batch_overfit, outcome, write
from trainer.job import REQUEUE, Stop, UserError
from trainer.language import LanguageModel
from trainer.micro import fitted
from trainer.models import make
from trainer.optimizer import make_optimizer, schedule
from trainer.ranks import Ranks, join
from trainer.settings import check_same, checked, identity
from trainer.tokens import Streams, Windows, open_tokens, validation_of

VALIDATED_TOGETHER = 8  # sequences, or an LSTM's streams: the same for every model, whatever fits at once
STATES = {"adamw": 2, "adam": 2, "sgd": 1}  # tensors of a parameter's size that the optimizer keeps
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main(stop: Stop) -> int:
    """Exit code: 0 when the model is there, 75 when the run is to be started again."""
    parser = argparse.ArgumentParser(description="Trains a language model. train.yaml explains the settings.")
    parser.add_argument("--config", type=Path, required=True, help="YAML file with every setting")
    parser.add_argument("--out", type=Path, default=Path(), help="folder to write to")
    arguments = parser.parse_args()
    config = checked(job.read_config(arguments.config, Path(__file__).with_suffix(".yaml")))
    out = arguments.out
    if job.done_steps(out) >= config.max_steps:
        file = out / "model" / "config.json"
        made = job.read_json(file) if file.is_file() else identity(config)
        check_same(identity(config), made, file, "take another --out")
        print(f"{out / 'DONE'} is there: nothing to do")
        return 0
    if (out / "model").is_dir() and not (out / "metrics.jsonl").exists():
        raise UserError(f"{out / 'model'} holds a model that no training here made: take another --out")
    ranks = join(config.device)
    out.mkdir(parents=True, exist_ok=True)
    try:
        with job.alone(out) if ranks.writes else nullcontext():
            return 0 if Training(config, out, ranks).train(stop) else REQUEUE
    finally:
        ranks.leave()


class Diverged(Exception):
    """The loss is no number any more. That is a result: starting again would only repeat it."""


class MemoryRanOut(Exception):
    """In a process, and so for all. `whole`: whether the weights are still those of the last step."""

    def __init__(self, when: str, whole: bool = True):
        super().__init__(when)
        self.whole = whole


class Training:
    """Model, data, optimizer and how many steps are done; made as the last checkpoint left them."""

    def __init__(self, config: SimpleNamespace, out: Path, ranks: Ranks):
        self.config, self.out, self.ranks, self.device = config, out, ranks, ranks.device
        if wrong := conflict(vars(config) | {"device": self.device.type}):  # null may be either
            raise UserError(wrong)
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # docs.pytorch.org, notes on randomness
            torch.use_deterministic_algorithms(True)
        folder = open_tokens(job.folder_of(config, "dataset"))
        read = Streams if config.architecture == "lstm" else Windows
        self.data = read(folder.split("train"), config.seq_len, config.batch_size, config.seed)
        self.validation = validation_of(folder.split("validation"), config.val_tokens)
        hashes = {"dataset": folder.sha256["train"], "validation": self.validation.sha256}
        self.identity = identity(config) | hashes | {"vocab_size": folder.vocab_size}
        saved = load_checkpoint(out / "checkpoints", self.identity)
        if not saved and (done := job.done_steps(out)):
            raise UserError(f"{out} has ended after step {done} and its checkpoints are gone: take another --out")

        self.model = make(config, folder.vocab_size, self.device)  # the same first values in every process
        self.forward = torch.compile(self.model) if config.compile else self.model
        self.optimizer = make_optimizer(self.model, config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.dtype == "fp16")
        self.micro = fitted(config, ranks, out, saved["micro_batch_size"] if saved else None, self._try)
        self.step, self.tokens, self.validated, self.state = 0, 0, -1, None
        self.train_s = self.checkpoint_s = 0.0  # of this start
        if saved:
            self._resume(saved)
        self.began_at, self.recorded = self.step, last_step(out / "metrics.jsonl")
        if self.step == 0 and config.overfit_steps and ranks.writes:
            write(out, [one_batch_overfit(self.model, self._first_loss, steps=config.overfit_steps)])
        ranks.wait()
        looked, settle = config.guard_steps if ranks.writes else 0, max(0, config.warmup_steps - self.step)
        self.guards = Guards(self.model, self.optimizer, out, self.step, steps=looked, settle=settle)
        shape = self.model.shape
        self.flops = shape.train_flops(config.seq_len) * self.tokens_per_step
        self._record(
            "start", recipe="train", started=job.started(), **job.describe_device(self.device),
            world_size=ranks.world_size, n_params=shape.n_params, n_trainable=shape.n_params,
            n_non_embedding=shape.n_non_embedding, shape=shape.as_dict(),
            flops_per_token=shape.train_flops(config.seq_len),
            n_samples=self.data.n_samples, batch_size=config.batch_size, micro_batch_size=self.micro.size,
            deviation=self.micro.deviation, steps_per_epoch=max(1, self.data.n_samples // config.batch_size),
            total_steps=config.max_steps, step=self.step, train_sha256=folder.sha256["train"],
            val_sha256=self.validation.sha256, val_tokens=self.validation.n_targets,
            packages={"torch": version("torch")}, setup_s=job.age_s(),
        )  # fmt: skip

    @property
    def tokens_per_step(self) -> int:
        """Tokens, and as many targets, of a batch over all processes."""
        return self.config.batch_size * self.config.seq_len

    @property
    def rows(self) -> range:
        """The rows of a batch that this process takes; of an LSTM, its streams."""
        each = self.config.batch_size // self.ranks.world_size
        return range(self.ranks.rank * each, (self.ranks.rank + 1) * each)

    def train(self, stop: Stop) -> bool:
        """All steps that are left, then the model and DONE; False if the run is to be started again.

        A training that diverges ends there, with DONE and the guard "finite loss" fired. Raises UserError where
        starting again would not help.
        """
        try:
            return self._train(stop)
        except MemoryRanOut as where:
            return self._take_less_memory(where)
        except Diverged as diverged:
            print(f"diverged: {diverged}; a lower lr, clipped gradients or fp32 may help", file=sys.stderr)
            self._finish(self.train_s, self.checkpoint_s, diverged)
            return True

    def _train(self, stop: Stop) -> bool:
        config = self.config
        with tqdm(
            total=config.max_steps, initial=self.step, disable=not self.ranks.writes,
            mininterval=0.1 if sys.stderr.isatty() else 10.0,
        ) as bar:  # fmt: skip
            if self._validation_is_due() and self.validated < self.step:
                self.validate()  # a signal came before it
            while self.step < config.max_steps:
                began = time.perf_counter()
                done, stopped = self._optimizer_step(stop)
                seconds = time.perf_counter() - began
                self.train_s += seconds
                self.step += 1
                bar.set_description(f"Loss: {done['loss']:.4f}", refresh=False)
                bar.update(1)
                if self.step % config.log_every_n_steps == 0 or self.step == config.max_steps:
                    done |= {"tokens_per_s": self.tokens_per_step / seconds, "seconds": seconds}
                    self._record("step", step=self.step, **done, **job.peak_memory(self.device))
                if self._validation_is_due() and not stopped:
                    self.validate()
                if stopped or self._checkpoint_is_due():
                    self.checkpoint_s += self._save_checkpoint()
                if stopped and self.step < config.max_steps:
                    return False
        if self.validated < self.step:
            self.validate()
        self._finish(self.train_s, self.checkpoint_s)
        return True

    def _optimizer_step(self, stop: Stop) -> tuple[dict[str, Any], bool]:
        """One step on a batch, and whether a signal came to any process. Raises Diverged and MemoryRanOut."""
        config = self.config
        loss, failed = job.within_memory(self._gradients)
        loss, seen, stops, failures = self.ranks.total(loss, 0 if failed else self.seen, stop.asked, failed)
        if failures:
            raise MemoryRanOut(f"in step {self.step + 1}")
        if not math.isfinite(loss):
            raise Diverged(f"the loss is {loss} at step {self.step + 1}")
        self.state, self.tokens = self.next_state, self.tokens + round(seen)
        norm, failed = job.within_memory(self._update)
        (failures,) = self.ranks.total(failed)
        if failures:  # some weights may have moved already
            raise MemoryRanOut(f"in the optimizer's part of step {self.step + 1}", whole=False)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        n = round(seen)
        counts = {"tokens": n, "padded_tokens": n, "label_tokens": n, "samples": config.batch_size}
        shown, factor = norm if math.isfinite(norm) else None, schedule(config, self.step)
        done = {"loss": loss, "lr": config.lr * factor, "grad_norm": shown, "flops": self.flops, **counts}
        return done | {"longest_pass_tokens": self.micro.size * config.seq_len}, stops > 0

    def _update(self) -> float:
        """Moves the weights by the gradients of all processes; their norm before it was clipped. Raises Diverged."""
        self.ranks.add_up(self.model.parameters())
        self.scaler.unscale_(self.optimizer)
        most = self.config.clip_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), most).item()
        # The scaler leaves such a step out and halves its scale. Below 1, no scale would help.
        if not math.isfinite(norm) and (not self.scaler.is_enabled() or self.scaler.get_scale() < 1):
            raise Diverged(f"the gradient's norm is {norm} at step {self.step + 1}")
        factor = schedule(self.config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        with self.guards.step(self.step):
            self.scaler.step(self.optimizer)
        return norm

    def _gradients(self) -> float:
        """Forward and backward passes over this process's rows; its part of the batch's mean loss, in nats a token.

        Beside the gradients it leaves `seen`, targets of this process, and `next_state`, which counts once no process
        has run out of memory.
        """
        torch.manual_seed(seed_of(self.config.seed, self.step, self.ranks.rank, 1))  # dropout's, so none need be kept
        batch = self.data.batch(self.step, self.rows)
        state = None if self.data.begins(self.step) else self.state
        loss, after = self._in_parts(batch, state, self.micro.size, backward=True)
        self.seen, self.next_state = batch[:, 1:].numel(), after
        return loss

    def _in_parts(self, lines: Tensor, state: Any, size: int, backward: bool = False) -> tuple[float, Any]:
        """The loss of "row seq+1" lines, `size` rows at a time, and the state after them; gradients where asked for."""
        total, left = 0.0, []
        for first in range(0, len(lines), size):
            part = slice(first, first + size)
            before = None if state is None else tuple(each[:, part] for each in state)
            loss, after = self._pass(lines[part].to(self.device), before)
            if backward:
                self.scaler.scale(loss).backward()
            total += loss.item()
            left.append(after)
        return total, None if left[0] is None else tuple(torch.cat([each[i] for each in left], 1) for i in (0, 1))

    def _pass(self, lines: Tensor, state: Any) -> tuple[Tensor, Any]:
        """The loss of "row seq+1" lines as their part of the batch's mean, and the state after them."""
        with self._autocast():
            hidden, after = self.forward(lines[:, :-1], state)
            return self.model.loss(hidden, lines[:, 1:]) / self.tokens_per_step, after

    def validate(self) -> None:
        """Records the mean loss over the validation's targets, in nats a token. Raises Diverged and MemoryRanOut."""
        began = time.perf_counter()
        loss, failed = job.within_memory(self._validation_loss)
        (failures,) = self.ranks.total(failed)
        if failures:
            raise MemoryRanOut(f"in the validation after step {self.step}")
        self.validated = self.step
        if not math.isfinite(loss):
            raise Diverged(f"the validation loss is {loss} after step {self.step}")
        self._record(
            "validation", step=self.step, loss=loss, label_tokens=self.validation.n_targets, samples=1,
            seconds=time.perf_counter() - began,
        )  # fmt: skip

    @torch.no_grad()
    def _validation_loss(self) -> float:
        """The same for every model: of a micro batch that is smaller than what is validated together, in parts."""
        total, state, size = 0.0, None, min(self.micro.size, VALIDATED_TOGETHER)
        self.model.eval()
        carries = self.config.architecture == "lstm"
        pieces = self.validation.streams if carries else self.validation.windows
        for lines in pieces(self.config.seq_len, VALIDATED_TOGETHER):
            if state is not None and len(lines) != state[0].shape[1]:
                state = None
            loss, state = self._in_parts(lines, state, size)
            total += loss * self.tokens_per_step
        self.model.train()
        return total / self.validation.n_targets

    def _first_loss(self, model: LanguageModel) -> Tensor:
        """The mean loss of a model on half of the first micro batch: a copy of the model needs memory too."""
        lines = self.data.batch(0, self.rows[: max(1, self.micro.size // 2)]).to(self.device)
        with self._autocast():
            hidden, _ = model(lines[:, :-1])
            return model.loss(hidden, lines[:, 1:]) / lines[:, 1:].numel()

    def _try(self, size: int) -> None:
        """A forward and a backward pass of `size` sequences beside what the optimizer will keep, without a trace."""
        zeros = torch.zeros(size, self.config.seq_len + 1, dtype=torch.int64, device=self.device)
        kept = [torch.empty_like(p) for p in self.model.parameters() for _ in range(STATES[self.config.optimizer])]
        self.scaler.scale(self._pass(zeros, None)[0]).backward()
        self.optimizer.zero_grad(set_to_none=True)
        del kept

    def _autocast(self) -> torch.autocast:
        dtype = DTYPES[self.config.dtype]
        return torch.autocast(self.device.type, dtype, enabled=dtype is not torch.float32)

    def _validation_is_due(self) -> bool:
        every = self.config.run_val_every_n_steps
        return self.step == self.config.max_steps or bool(every and self.step and self.step % every == 0)

    def _take_less_memory(self, ran_out: MemoryRanOut) -> bool:
        """Saves what was done and notes a smaller micro batch for the next start; UserError where there is none."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.step > self.began_at and ran_out.whole:
            self._save_checkpoint()
        advice = "lower seq_len or width, or take a device with more memory"
        print(self.micro.take_less(self.out, self.ranks, str(ran_out), advice), file=sys.stderr)
        return False

    def _checkpoint_is_due(self) -> bool:
        """Also after the last step that an attempt killed before had recorded: nothing is to be lost twice."""
        every = self.config.save_every_n_steps
        return self.step in (self.recorded, self.config.max_steps) or bool(every and self.step % every == 0)

    def _save_checkpoint(self) -> float:
        """Seconds it took."""
        began = time.perf_counter()
        carried = None if self.state is None else [self.ranks.gather(each, 1) for each in self.state]
        if self.ranks.writes:
            state = {
                "step": self.step,
                "tokens": self.tokens,
                "validated": self.validated,
                "micro_batch_size": self.micro.size,
                "model": {name: p.detach().cpu() for name, p in self.model.named_parameters()},
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "carried": carried,
                "identity": self.identity,
            }
            save_checkpoint(self.out / "checkpoints", state, keep=self.config.keep_checkpoints)
        self.ranks.wait()
        seconds = time.perf_counter() - began
        self._record("checkpoint", step=self.step, seconds=seconds)
        return seconds

    def _resume(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                p.copy_(state["model"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.tokens, self.validated = state["step"], state["tokens"], state["validated"]
        if state["carried"] is not None:
            rows = slice(self.rows.start, self.rows.stop)
            self.state = tuple(each[:, rows].to(self.device) for each in state["carried"])

    def _finish(self, train_s: float, checkpoint_s: float, diverged: Diverged | None = None) -> None:
        """The trained model, what the guards saw, and DONE."""
        if self.ranks.writes:
            about = vars(self.config) | {"shape": self.model.shape.as_dict()}
            save_model(self.out / "model", dict(self.model.named_parameters()), about)
            planned = self.config.max_steps * self.tokens_per_step
            seen = budget_met(self.tokens, planned, self.data.epochs(self.step), self.config.max_epochs)
            wrong = [str(diverged)] if diverged else []
            finite = outcome("finite loss", self.step + len(wrong), wrong, "at every step", "diverged")
            self.guards.finish(seen, finite)
            memory = job.peak_memory(self.device)
            self._record(
                "end", step=self.step, ended=job.now(), train_s=train_s, checkpoint_s=checkpoint_s,
                diverged=str(diverged) if diverged else None, **memory,
            )  # fmt: skip
            job.write_json(self.out / "DONE", {"step": self.step, "diverged": diverged is not None})
        self.ranks.wait()

    def _record(self, event: str, **values: Any) -> None:
        if self.ranks.writes:
            append_event(self.out / "metrics.jsonl", event, **values)


if __name__ == "__main__":
    job.run(lambda: main(STOP))
