"""Parsers: logs written by hand in the formats of their frameworks, and anything else, which must not break them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from chiplog.errors import RecordError
from chiplog.ledger.parse import continued, parse_job, parse_log
from chiplog.ledger.reader import BLOCK, LogReader, pattern
from chiplog.record import Record, State

SHARED = Path(__file__).resolve().parents[3] / "shared" / "logs"

# ruff: noqa: E501
TORCHTUNE = """\
INFO:torchtune.utils._logging:Running LoRAFinetuneRecipeSingleDevice with resolved config:

batch_size: 4
dataset:
  _component_: torchtune.datasets.chat_dataset
  packed: true
dtype: bf16
epochs: 2
gradient_accumulation_steps: 8
max_steps_per_epoch: null
model:
  _component_: torchtune.models.llama3_2.lora_llama3_2_3b
  lora_rank: 64
tokenizer:
  max_seq_len: 2048

INFO:torchtune.utils._logging:Memory stats after model init:
\tGPU peak memory allocation: 6.21 GiB
\tGPU peak memory reserved: 6.27 GiB
1|1|Loss: 2.5:   2%|▏         | 1/50 [00:02<01:38,  2.00s/it]\r1|2|Loss: 2.25:   4%|▍         | 2/50 [00:04<01:36,  2.00s/it]\r\
1|50|Loss: 1.5: 100%|██████████| 50/50 [01:40<00:00,  2.00s/it]
INFO:torchtune.utils._logging:Checkpoint saved in 30.50 seconds.
1|50|Loss: 1.5: 100%|██████████| 50/50 [02:10<00:00,  2.60s/it]
2|51|Loss: 1.4:   2%|▏         | 1/50 [00:02<01:38,  2.00s/it]\r2|100|Loss: 1.125: 100%|██████████| 50/50 [01:40<00:00,  2.00s/it]
INFO:torchtune.utils._logging:Checkpoint saved in 29.50 seconds.
"""

TRAINER = """\
[INFO|trainer.py:2134] 2026-01-02 03:04:05,678 >> ***** Running training *****
[INFO|trainer.py:2135] 2026-01-02 03:04:05,678 >>   Num examples = 4,000
[INFO|trainer.py:2136] 2026-01-02 03:04:05,678 >>   Num Epochs = 3
[INFO|trainer.py:2137] 2026-01-02 03:04:05,678 >>   Instantaneous batch size per device = 8
[INFO|trainer.py:2140] 2026-01-02 03:04:05,678 >>   Total train batch size (w. parallel, distributed & accumulation) = 32
[INFO|trainer.py:2141] 2026-01-02 03:04:05,678 >>   Gradient Accumulation steps = 4
[INFO|trainer.py:2142] 2026-01-02 03:04:05,678 >>   Total optimization steps = 375
  0%|          | 0/375 [00:00<?, ?it/s]
{'loss': 1.5, 'grad_norm': 0.5, 'learning_rate': 9e-05, 'epoch': 0.8}
 27%|██▋       | 100/375 [00:50<02:17,  2.00it/s]
{'eval_loss': 1.25, 'eval_runtime': 4.0, 'epoch': 1.0}
{'loss': 0.75, 'grad_norm': 0.25, 'learning_rate': 0.0, 'epoch': 3.0}
100%|██████████| 375/375 [03:07<00:00,  2.00it/s]
{'train_runtime': 187.5, 'train_samples_per_second': 64.0, 'train_steps_per_second': 2.0, 'train_loss': 1.1, 'epoch': 3.0}
"""

MEGATRON = """\
using world size: 16, data-parallel-size: 4, tensor-model-parallel size: 4, pipeline-model-parallel size: 1
  micro_batch_size ................................ 2
  seq_length ...................................... 2048
 iteration       10/    1000 | consumed samples:          640 | elapsed time per iteration (ms): 2000.0 | \
learning rate: 1.500E-04 | global batch size:    64 | lm loss: 9.5E+00 | number of nan iterations:   0 |
[Rank 0] (after 10 iterations) memory (MB) | allocated: 19494.5 | max allocated: 22106.5 | reserved: 26720.0 | max reserved: 26720.0
 iteration       20/    1000 | consumed samples:         1280 | elapsed time per iteration (ms): 1000.0 | \
learning rate: 1.500E-04 | global batch size:    64 | lm loss: 8.25E+00 | number of nan iterations:   0 |
"""

LIGHTNING = """\
GPU available: True (cuda), used: True
LOCAL_RANK: 0 - CUDA_VISIBLE_DEVICES: [0,1]
1.2 M     Total params
Epoch 0:  50%|█████     | 50/100 [00:10<00:10,  5.00it/s, v_num=0, train_loss=2.00]
Epoch 1: 100%|██████████| 100/100 [00:20<00:00,  5.00it/s, v_num=0, train_loss=1.50]
`Trainer.fit` stopped: `max_epochs=2` reached.
"""

KERAS = """\
Epoch 1/2
 50/100 [=============>................] - ETA: 1s - loss: 0.9000
100/100 [==============================] - 3s 30ms/step - loss: 0.8000 - val_loss: 0.7000
Epoch 2/2
100/100 [==============================] - 3s 30ms/step - loss: 0.5000 - val_loss: 0.6000
"""

MAXTEXT = """\
completed step: 0, seconds: 20.0, TFLOP/s/device: 10.0, Tokens/s/device: 400.0, total_weights: 8192, loss: 10.5
completed step: 1, seconds: 2.0, TFLOP/s/device: 100.0, Tokens/s/device: 4000.0, total_weights: 8192, loss: 9.5
"""

SACCT = """\
JobID|State|Elapsed|MaxRSS|ExitCode|AllocTRES
101|COMPLETED|1-02:03:04||0:0|billing=8,gres/gpu=2
101.batch|COMPLETED|1-02:03:04|1048576K|0:0|
102_3|CANCELLED by 1000|00:10:00||0:15|
103|OUT_OF_MEMORY|00:01:00||0:125|
104|TIMEOUT|01:00:00||0:0|
"""


def log(tmp_path: Path, text: str, name: str = "a.log") -> Path:
    file = tmp_path / name
    file.write_bytes(text.encode())
    return file


def one(tmp_path: Path, text: str) -> Record:
    (record,) = parse_log(log(tmp_path, text)).records
    return record


def known(record: Record) -> dict[str, Any]:
    return record.usage.model_dump(exclude_none=True, exclude={"resumed", "val_losses"})


def test_torchtune(tmp_path: Path):
    record = one(tmp_path, TORCHTUNE)
    assert record.state is State.COMPLETED and record.framework == "torchtune"
    assert (record.recipe, record.model) == ("LoRAFinetuneRecipeSingleDevice", "lora_llama3_2_3b")
    assert record.method == "lora"
    chosen = {"micro_batch_size": 4, "batch_size": 32, "grad_accum": 8, "max_seq_len": 2048, "packed": True}
    assert chosen.items() <= record.config.items() and record.config["lora_rank"] == 64
    usage = record.usage
    assert (usage.steps, usage.steps_planned, usage.epoch) == (100, 100, 2.0)
    assert (usage.loss_first, usage.loss_last) == (2.5, 1.125)
    assert usage.train_s == 200 and usage.mean_steps_per_s == pytest.approx(0.5)  # the saves are no training
    assert usage.checkpoint_s == 60
    assert usage.mem_kind == "after_init"  # which is no peak


def test_transformers(tmp_path: Path):
    record = one(tmp_path, TRAINER)
    assert record.state is State.COMPLETED
    chosen = {"micro_batch_size": 8, "batch_size": 32, "grad_accum": 4, "epochs": 3, "n_samples": 4000}
    assert chosen.items() <= record.config.items()
    usage = record.usage
    assert (usage.steps, usage.steps_planned, usage.epoch) == (375, 375, 3.0)
    assert (usage.loss_first, usage.loss_last, usage.loss_mean) == (1.5, 0.75, 1.1)
    assert usage.val_losses == [1.25] and usage.train_s == 187.5
    assert (usage.mean_steps_per_s, usage.samples_per_s) == (2.0, 64.0)


def test_two_runs_in_a_file_are_two_records(tmp_path: Path):
    first, second = parse_log(log(tmp_path, TRAINER + TRAINER.replace("0.75", "0.5"))).records
    assert (first.usage.loss_last, second.usage.loss_last) == (0.75, 0.5)
    assert first.key != second.key


def test_every_rank_announces_the_same_run(tmp_path: Path):
    head = "".join(TRAINER.splitlines(keepends=True)[:7])
    ranks = "".join(f"{rank}: {line}" for rank in range(4) for line in head.splitlines(keepends=True))
    assert len(parse_log(log(tmp_path, ranks + TRAINER)).records) == 1


def test_megatron(tmp_path: Path):
    record = one(tmp_path, MEGATRON)
    assert record.state is State.INCOMPLETE  # 20 of 1000, and the log stops
    assert {"steps": 20, "steps_planned": 1000, "gpus": 16, "loss_last": 8.25}.items() <= known(record).items()
    assert record.usage.peak_mem_bytes == round(22106.5 * 2**20) and record.usage.mem_kind == "allocated"
    assert {"micro_batch_size": 2, "batch_size": 64, "max_seq_len": 2048}.items() <= record.config.items()
    assert record.usage.steps_per_s == 1.0  # of the last quarter: the first iterations warm up


def test_lightning(tmp_path: Path):
    record = one(tmp_path, LIGHTNING)
    assert record.state is State.COMPLETED
    assert {"steps": 200, "epoch": 1.0, "gpus": 2, "loss_last": 1.5}.items() <= known(record).items()
    assert record.usage.mean_steps_per_s == pytest.approx(5.0)


def test_keras(tmp_path: Path):
    record = one(tmp_path, KERAS)
    assert record.state is State.COMPLETED
    assert {"steps": 200, "steps_planned": 200, "loss_last": 0.5}.items() <= known(record).items()
    assert record.usage.val_losses == [0.7, 0.6]


def test_maxtext(tmp_path: Path):
    usage = one(tmp_path, MAXTEXT).usage
    assert (usage.steps, usage.loss_last, usage.tokens_per_s, usage.tokens_scope) == (1, 9.5, 4000.0, "per_gpu")


def test_sacct_gives_a_record_a_job(tmp_path: Path):
    records = {record.job_id: record for record in parse_log(log(tmp_path, SACCT, "sacct.txt")).records}
    states = [State.COMPLETED, State.CANCELLED, State.OUT_OF_MEMORY, State.TIMEOUT]
    assert {key: record.state for key, record in records.items()} == dict(
        zip(["101", "102_3", "103", "104"], states, strict=True)
    )
    usage = records["101"].usage
    assert (usage.elapsed_s, usage.gpus, usage.peak_mem_bytes, usage.mem_kind) == (93784, 2, 2**30, "host_rss")


GPU_OOM = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.25 GiB of "
    "which 1.50 GiB is free. Including non-PyTorch memory, this process has 77.75 GiB memory in use."
)
BAR = " 10%|█         | 10/100 [00:20<03:00,  2.00s/it]\n"


@pytest.mark.parametrize(
    ("end", "state", "words"),
    [
        ("slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 2026-01-01T00:00:00 DUE TO TIME LIMIT ***", "TIMEOUT", "LIMIT"),
        ("slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 2026-01-01T00:00:00 ***", "CANCELLED", "JOB 7"),
        ("slurmstepd: error: *** STEP 7.0 ON n1 CANCELLED AT 2026-01-01T00:00:00 DUE TO PREEMPTION ***", "PREEMPTED", "7"),
        ("slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 2026-01-01T00:00:00 DUE TO NODE FAILURE, SEE LOG ***", "NODE_FAIL", "NODE"),
        ("slurmstepd: error: Detected 1 oom_kill event in StepId=7.batch. Some of the step tasks have been OOM Killed.", "OUT_OF_MEMORY", "oom"),
        ("slurmstepd: error: Exceeded job memory limit", "OUT_OF_MEMORY", "memory"),
        (f"Traceback (most recent call last):\n  File \"a.py\", line 1\n{GPU_OOM}", "OUT_OF_MEMORY", "2.00 GiB"),
        ("Traceback (most recent call last):\n  File \"a.py\", line 1\nValueError: no such layer", "FAILED", "no such layer"),
        ("Traceback (most recent call last):\n  File \"a.py\", line 1\nKeyboardInterrupt", "CANCELLED", "Keyboard"),
        ("srun: error: n1: task 0: Exited with exit code 3", "FAILED", "exit code 3"),
        ("a.sh: line 3: torchrun: command not found", "FAILED", "command not found"),
        ("", "INCOMPLETE", "without saying why"),
        ("Training completed.", "COMPLETED", None),
    ],
)  # fmt: skip
def test_each_way_to_end_has_its_state(tmp_path: Path, end: str, state: str, words: str | None):
    record = one(tmp_path, BAR + end + "\n")
    assert record.state == state and (record.reason is None if words is None else words in (record.reason or ""))


def test_what_cuda_says_of_its_memory_is_kept(tmp_path: Path):
    oom = one(tmp_path, f"{BAR}Traceback (most recent call last):\n{GPU_OOM}\n").oom
    assert oom and oom.kind == "gpu"
    assert (oom.tried_bytes, oom.capacity_bytes, oom.in_use_bytes) == (2 * 2**30, 79.25 * 2**30, 77.75 * 2**30)


def test_an_error_that_was_caught_and_trained_past_ended_nothing(tmp_path: Path):
    more = "".join(f" {n}%|█         | {n}/100 [00:{n % 60:02}<03:00,  2.00s/it]\n" for n in range(11, 100)) * 8
    text = (
        f"{BAR}Traceback (most recent call last):\n{GPU_OOM}\n{more}100%|██████████| 100/100 [03:20<00:00,  2.00s/it]\n"
    )
    assert one(tmp_path, text).state is State.COMPLETED


def test_nan_is_a_value_and_comes_back_from_its_line(tmp_path: Path):
    record = one(tmp_path, TRAINER.replace("'loss': 0.75", "'loss': nan"))
    assert record.usage.loss_last != record.usage.loss_last
    assert '"loss_last":"NaN"' in record.model_dump_json()
    assert Record.model_validate_json(record.model_dump_json()).usage.loss_last != 0


def test_the_evidence_stands_at_its_byte(tmp_path: Path):
    file = log(tmp_path, "\x1b[32mheading\x1b[0m\r\n" + TRAINER)
    (record,) = parse_log(file).records
    content = file.read_bytes()
    assert {entry.of for entry in record.evidence} >= {"loss_last", "steps", "batch_size"}
    for entry in record.evidence:
        line = content[entry.offset :].split(b"\n")[0].decode()
        assert line.split()[-1] in entry.line


def test_output_in_two_files_is_one_job(tmp_path: Path):
    out = log(tmp_path, "".join(line for line in TRAINER.splitlines(keepends=True) if line.startswith("{")), "j.out")
    bars = "".join(line for line in TRAINER.splitlines(keepends=True) if "%|" in line)
    err = log(tmp_path, bars + "slurmstepd: error: *** JOB 9 ON n CANCELLED AT 2026-01-01T00:00:00 ***\n", "j.err")
    (record,) = parse_job([out, err])
    assert (record.usage.steps, record.usage.loss_last, record.job_id) == (375, 0.75, "9")
    assert record.state is State.CANCELLED and len(record.logs) == 2


def test_a_gzip_reads_as_what_it_holds(tmp_path: Path):
    packed = tmp_path / "a.log.gz"
    packed.write_bytes(gzip.compress(TRAINER.encode()))
    assert known(parse_log(packed).records[0]) == known(one(tmp_path, TRAINER))
    packed.write_bytes(packed.read_bytes()[:-20])  # cut off: what came before it is still a log
    assert parse_log(packed).records[0].usage.loss_first == 1.5


@pytest.mark.parametrize("cut", [200, 500, 900, 1200])
def test_a_log_that_grew_reads_as_if_at_once(tmp_path: Path, cut: int):
    content = TRAINER.encode()
    at = content.rfind(b"\n", 0, cut) + 1
    file = tmp_path / "a.log"
    file.write_bytes(content[:at])
    before = parse_log(file)
    file.write_bytes(content)
    after = parse_log(file, before.read_to, "transformers")
    (grown,) = continued(before.records, after.records)
    whole = one(tmp_path, TRAINER)
    assert known(grown) == known(whole) and grown.state is whole.state and grown.config == whole.config


@pytest.mark.parametrize("kind", ["missing", "folder", "circle"])
def test_what_cannot_be_read_is_named(tmp_path: Path, kind: str):
    file = tmp_path / "a.log"
    if kind == "folder":
        file.mkdir()
    elif kind == "circle":
        file.symlink_to(file)
    with pytest.raises(RecordError, match=r"a\.log cannot be read"):
        parse_log(file)


def test_lines_across_blocks_are_found_once_and_where_they_are(tmp_path: Path):
    rows = [f"row {number}: value={number}\n" for number in range(20_000)]
    file = log(tmp_path, "".join(rows))
    with LogReader(file) as reader:
        found = list(reader.whole.all(pattern(rb"^row (?P<n>\d+): value=(?P<m>\d+)$", b"value=")))
        assert reader.size > 4 * BLOCK
    assert [entry["n"] for entry in found] == [str(number) for number in range(20_000)]
    content = file.read_bytes()
    assert all(content[entry.offset :].startswith(f"row {entry['n']}:".encode()) for entry in found[::97])


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real logs are not beside this checkout")
def test_the_real_logs_read_as_their_truth_says():
    import sys

    sys.path.insert(0, str(SHARED))
    import score_logs  # pyright: ignore[reportMissingImports]

    from chiplog.ledger.row import row

    index = json.loads((SHARED / "index.json").read_text())
    rows = {e["id"]: row(parse_job([SHARED / f["file"] for f in e["files"]])) for e in index["entries"]}
    result, bad = score_logs.score(index, rows)
    states = result["fields"]["terminal_state"]
    assert states["ok"] == states["n"], [entry for entry in bad if entry[1] == "terminal_state"]
    assert result["micro_recall"] >= 0.98 and result["false_rate"] <= 0.01
