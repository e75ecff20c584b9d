"""How jobs end, in the words of those who end them, after a bar that was not at its end."""

from __future__ import annotations

from pathlib import Path

import pytest

from chiplog.ledger.parse import parse_log
from chiplog.record import State

# ruff: noqa: E501
BAR = "  1%|1         | 10/1000 [00:20<33:00,  2.00s/it, loss=2.5]\n"
TRACE = 'Traceback (most recent call last):\n  File "/home/u/train.py", line 7, in <module>\n    main()\n'
GIB = 2**30
ENDS: dict[State, list[str]] = {
    State.COMPLETED: [
        "Training complete!\n", "training finished\n", "Finished Training\n", "Done training.\n", "Training has been completed.\n",
        "Total training time: 1:02:03\n", "Training took 1.50 hours\n", "Finetuning done.\n", "Done!\n", "All done.\n", "=== Finished ===\n",
        "Exit status: 0\n", "[2024-01-02 03:04:05,101] [INFO] [launch.py:347:main] Process 123 exits successfully.\n",
        "I0203 22:12:03.345954  3769 caffe.cpp:254] Optimization Done.\n",
        "Training completed. Do not forget to share your model on huggingface.co/models =)\n",
    ],
    State.FAILED: [
        TRACE + "ValueError: no such key\n", TRACE + "KeyError: 'x'\n", TRACE + "AssertionError\n",
        TRACE + "concurrent.futures.process.BrokenProcessPool: A process in the process pool was terminated abruptly\n",
        TRACE + "socket.timeout: timed out\n", TRACE + "queue.Empty\n", TRACE + "json.decoder.JSONDecodeError: Expecting value: line 1 column 1 (char 0)\n",
        TRACE + "ray.exceptions.RayTaskError(ValueError): ray::main() (pid=123, ip=10.0.0.1)\n",
        TRACE + "OSError: [Errno 28] No space left on device\n", TRACE,
        TRACE + "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n============\ntrain.py FAILED\n",
        TRACE + "subprocess.CalledProcessError: Command '['python']' returned non-zero exit status 1.\n",
        "terminate called after throwing an instance of 'c10::Error'\n  what():  CUDA error: an illegal memory access\n",
        "Segmentation fault (core dumped)\n", "Illegal instruction (core dumped)\n", "double free or corruption (out)\nAborted (core dumped)\n",
        "/bin/bash: line 1:   123 Killed                  python train.py\n",
        "srun: error: n1: task 0: Exited with exit code 1\n", "srun: error: n1: task 0: Segmentation fault\n",
        "make: *** [Makefile:3: train] Error 1\n", "Command exited with non-zero status 1\n",
        "usage: train.py [-h]\ntrain.py: error: unrecognized arguments: --foo\n", "bash: torchrun: command not found\n",
        "slurmstepd: error: execve(): python: No such file or directory\n",
        "RuntimeError: DataLoader worker (pid 123) is killed by signal: Killed. \n",
        "[rank3]:[E102 03:04:05.101 ProcessGroupNCCL.cpp:616] [Rank 3] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=5)\n",
        "Error executing job with overrides: ['lr=1']\n", "Exit Status:        -17 (Job execution failed)\n",
        "Command '['simulate', '--app', '.']' returned non-zero exit status 1.\n",
        "/var/spool/slurmd/job1929/slurm_script: line 16: syntax error near unexpected token `done'\n",
    ],
    State.OUT_OF_MEMORY: [
        TRACE + "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.25 GiB of which 1.50 GiB is free.\n",
        TRACE + "RuntimeError: CUDA out of memory. Tried to allocate 2.00 GiB (GPU 0; 79.25 GiB total capacity; 70.00 GiB already allocated; 1.00 GiB free; 75.00 GiB reserved in total by PyTorch)\n",
        TRACE + "RuntimeError: NPU out of memory. Tried to allocate 2.00 GiB (NPU 0; 60.97 GiB total capacity; 50.00 GiB already allocated)\n",
        TRACE + "jaxlib.xla_extension.XlaRuntimeError: RESOURCE_EXHAUSTED: Out of memory while trying to allocate 2147483648 bytes.\n",
        TRACE + "jaxlib.xla_extension.XlaRuntimeError: RESOURCE_EXHAUSTED: Failed to allocate request for 2.00GiB (2147483648B) on device ordinal 0\n",
        TRACE + "numpy.core._exceptions._ArrayMemoryError: Unable to allocate 2.00 GiB for an array with shape (1000, 1000) and data type float64\n",
        "slurmstepd: error: Detected 1 oom_kill event in StepId=123.0. Some of the step tasks have been OOM Killed.\nsrun: error: n1: task 0: Out Of Memory\n",
        "slurmstepd: error: Job 123 exceeded memory limit (626359956 > 512000000), being killed\nslurmstepd: error: Exceeded job memory limit\nslurmstepd: error: *** JOB 123 ON n1 CANCELLED AT 2024-01-02T03:04:05 ***\n",
        "TERM_MEMLIMIT: job killed after reaching LSF memory usage limit.\n",
    ],
    State.TIMEOUT: [
        "slurmstepd: error: *** JOB 123 ON n1 CANCELLED AT 2024-01-02T03:04:05 DUE TO TIME LIMIT ***\n",
        "slurmstepd: error: *** STEP 123.0 ON n1 CANCELLED AT 2024-01-02T03:04:05 DUE TO TIME LIMIT ***\nsrun: error: n1: task 0: Terminated\n",
        "=>> PBS: job killed: walltime 3615 exceeded limit 3600\n", "TERM_RUNLIMIT: job killed after reaching LSF run time limit.\nExited with exit code 140.\n",
    ],
    State.PREEMPTED: ["slurmstepd: error: *** JOB 123 ON n1 CANCELLED AT 2024-01-02T03:04:05 DUE TO PREEMPTION ***\n"],
    State.NODE_FAIL: [
        "slurmstepd: error: *** STEP 123.0 ON n1 CANCELLED AT 2024-01-02T03:04:05 DUE TO NODE FAILURE, SEE SLURMCTLD LOG FOR DETAILS ***\n",
        "srun: error: Node failure on n1\n",
    ],
    State.CANCELLED: [
        "2024-11-24 04:13:57.870606: Terminated\n",
        TRACE + "KeyboardInterrupt\n", "slurmstepd: error: *** JOB 123 ON n1 CANCELLED AT 2024-01-02T03:04:05 ***\n",
        "slurmstepd: error: *** JOB 123 ON n1 CANCELLED AT 2024-01-02T03:04:05 DUE to SIGNAL Terminated ***\n",
        TRACE + "torch.distributed.elastic.multiprocessing.api.SignalException: Process 123 got signal: 15\n",
        "/bin/bash: line 1:   123 Terminated              python train.py\n",
    ],
    State.INCOMPLETE: [
        "", "Saved checkpoint to out/step_10.pt\n", "/lib/x.py:7: UserWarning: this Error is old\n  warnings.warn('Error')\n", "Reported no errors.\n",
        TRACE.replace("Traceback", "Exception ignored in: <function f>\nTraceback") + "RuntimeError: already closed\n" + 3 * BAR,
    ],
}  # fmt: skip


@pytest.mark.parametrize(("state", "end"), [(state, end) for state, ends in ENDS.items() for end in ends])
def test_an_end_has_its_state(tmp_path: Path, state: State, end: str):
    file = tmp_path / "a.log"
    file.write_text(BAR + end)
    (record,) = parse_log(file).records
    assert record.state is state, record.reason
    assert (record.oom is not None) is (state is State.OUT_OF_MEMORY)
    if "2.00 GiB" in end or "2.00GiB" in end or "2147483648 bytes" in end:
        assert record.oom and record.oom.tried_bytes == 2 * GIB


def test_an_error_of_memory_that_was_caught_ended_nothing(tmp_path: Path):
    file = tmp_path / "a.log"
    file.write_text(BAR + ENDS[State.OUT_OF_MEMORY][0] + BAR.replace("10/", "20/") + "Training complete!\n")
    assert parse_log(file).records[0].state is State.COMPLETED


def test_the_first_loss_may_stand_behind_much_else(tmp_path: Path):
    file = tmp_path / "a.log"
    steps = "".join(f"step {n}/2000 loss {9 - n / 500:.3f}\n" for n in range(1, 2001))
    file.write_text("preparing data\n" * 2000 + steps)
    usage = parse_log(file).records[0].usage
    assert (usage.loss_first, usage.loss_last, usage.steps) == (8.998, 5.0, 2000)
