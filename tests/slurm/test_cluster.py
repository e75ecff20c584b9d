"""What an engine on Slurm rests on, each shown on the real one. README.md here has the formats at a glance."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import Cluster

TEST_ONLY = re.compile(
    r"sbatch: Job (\d+) to start at (\S+) using (\d+) processors on nodes (\S+) in partition (\S+)\n"
)
TOO_MANY = "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)"
REQUEUES_ITSELF = """
echo attempt $((${SLURM_RESTART_COUNT:-0} + 1))
if [ -z "$SLURM_RESTART_COUNT" ] && [ "$SLURM_ARRAY_TASK_ID" = 2 ]; then scontrol requeue TARGET; sleep 1000; fi
sleep 3
"""


def batch(cluster: Cluster, folder: Path, body: str, *options: str) -> str:
    """The id of a job that runs `body` in the folder."""
    return cluster.submit("--chdir", folder, "--open-mode=append", *options, "--wrap", body)


def plain(cluster: Cluster, job: str, fields: str = "%i|%T|%r") -> list[str]:
    """What squeue knows of a job, ended or not."""
    return sorted(cluster.squeue(job, "-t", "all", fields=fields))


def soon(ask: Callable[[], Any], answer: object, seconds: float = 30) -> None:
    """Asks until the answer is this one."""
    give_up = time.monotonic() + seconds
    while (last := ask()) != answer and time.monotonic() < give_up:
        time.sleep(0.1)
    assert last == answer


def rows(cluster: Cluster, job: str, fields: str, *options: str) -> list[str]:
    """What sacct says of a job without its steps."""
    return sorted("|".join(row.values()) for row in cluster.sacct(job, "-X", *options, fields=fields))


def restarts(cluster: Cluster, job: str) -> dict[str, int]:
    lines = cluster.run("squeue", "-h", "-t", "all", "-j", job, "-O", "JobArrayID:|,RestartCnt:|").stdout.splitlines()
    return {name: int(count) for name, count, _ in (line.split("|") for line in lines)}


@dataclass
class Slow:
    """Jobs whose end takes a minute and a half: a limit counts in whole minutes, and is looked at each half minute."""

    folder: Path
    timeout: str
    waits: str
    signalled: str


@pytest.fixture(scope="module", autouse=True)
def slow(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Slow:
    """Submitted before the first test, asked for by the last."""
    folder = tmp_path_factory.mktemp("slow")
    (folder / "arrays" / "train").mkdir(parents=True)
    for i, run in enumerate(("1B_rank4", "1B_rank8")):
        (folder / "runs" / run).mkdir(parents=True)
        (folder / "arrays" / "train" / str(i)).symlink_to(f"../../runs/{run}")
    output = "--output=arrays/train/%a/slurm-%A_%a.out"
    timeout = batch(cluster, folder, "echo hi; sleep 1000", "-t", "1", "--array=0-1", output)
    waits = batch(cluster, folder, "true", "--array=0-1", f"--dependency=afterok:{timeout}")
    trap = "trap 'echo saved; exit 75' USR1; for i in $(seq 1000); do sleep 0.1; done"
    signalled = batch(cluster, folder, trap, "-t", "1", "--signal=B:USR1@30", "--output=signalled.out")
    return Slow(folder, timeout, waits, signalled)


def test_a_held_array_waits_as_one_line_and_runs_under_its_cap_when_released(cluster: Cluster, tmp_path: Path):
    job = batch(cluster, tmp_path, "sleep 2", "--hold", "--array=3,5,7-9%2", "--comment=chiplog:lora-rank key")
    assert job.isdigit()
    assert plain(cluster, job, "%i|%F|%K|%T|%r|%k") == [
        f"{job}_[3,5,7-9%2]|{job}|3,5,7-9%2|PENDING|JobHeldUser|chiplog:lora-rank key"
    ]
    each = cluster.squeue(job, "-r", fields="%i|%F|%K|%T")
    assert each == [f"{job}_{i}|{job}|{i}|PENDING" for i in (3, 5, 7, 8, 9)]
    soon(lambda: rows(cluster, job, "JobID,State"), [f"{job}_[3,5,7-9%2]|PENDING"])
    cluster.run("scontrol", "release", job)
    two = [f"{job}_3|RUNNING|None", f"{job}_5|RUNNING|None", f"{job}_[7-9%2]|PENDING|JobArrayTaskLimit"]
    soon(lambda: plain(cluster, job), two)
    assert cluster.ended(job) == {f"{job}_{i}": "COMPLETED" for i in (3, 5, 7, 8, 9)}
    # The last element, and no other, keeps the array's id as its own.
    last = f"{job}_9|{job}|chiplog:lora-rank key"
    soon(lambda: [row for row in rows(cluster, job, "JobID,JobIDRaw,Comment") if f"|{job}|" in row], [last])


def test_one_element_of_a_held_array_can_be_released(cluster: Cluster, tmp_path: Path):
    job = batch(cluster, tmp_path, "true", "--hold", "--array=1-3")
    cluster.run("scontrol", "release", f"{job}_2")
    soon(lambda: plain(cluster, job), [f"{job}_2|COMPLETED|None", f"{job}_[1,3]|PENDING|JobHeldUser"])
    cluster.run("scancel", job)


def test_aftercorr_pairs_elements_and_kills_only_the_partner_of_the_failed_one(cluster: Cluster, tmp_path: Path):
    train = batch(cluster, tmp_path, "[ $SLURM_ARRAY_TASK_ID != 5 ]", "--hold", "--array=3,5,7%2")
    after = f"--dependency=aftercorr:{train}"
    test = batch(cluster, tmp_path, "true", "--array=3,5,7", after, "--kill-on-invalid-dep=yes")
    stays = batch(cluster, tmp_path, "true", "--array=3,5,7", after)
    assert plain(cluster, test, "%i|%T|%E") == [f"{test}_[3,5,7]|PENDING|aftercorr:{train}_*(unfulfilled)"]
    cluster.run("scontrol", "release", train)
    assert cluster.ended(test) == {f"{test}_3": "COMPLETED", f"{test}_5": "CANCELLED", f"{test}_7": "COMPLETED"}
    killed = f"{test}_5|CANCELLED|DependencyNeverSatisfied|aftercorr:{train}_*(failed)"
    assert killed in plain(cluster, test, "%i|%T|%r|%E")
    ends = [f"{test}_{i}|{state}|0:0" for i, state in ((3, "COMPLETED"), (5, "CANCELLED"), (7, "COMPLETED"))]
    soon(lambda: rows(cluster, test, "JobID,State,ExitCode"), ends)
    soon(lambda: cluster.squeue(stays), [f"{stays}_5|PENDING|DependencyNeverSatisfied"])
    cluster.run("scancel", stays)


def test_aftercorr_waits_for_the_whole_array_where_it_has_no_such_element(cluster: Cluster, tmp_path: Path):
    train = batch(cluster, tmp_path, "[ $SLURM_ARRAY_TASK_ID != 2 ]", "--hold", "--array=2,4")
    test = batch(cluster, tmp_path, "true", "--array=4,5", f"--dependency=aftercorr:{train}")
    cluster.run("scontrol", "release", train)
    never = [f"{test}_4|COMPLETED|None", f"{test}_5|PENDING|DependencyNeverSatisfied"]
    soon(lambda: plain(cluster, test), never)
    cluster.run("scancel", test)


def test_afterok_is_killed_and_afterany_runs_when_an_element_fails(cluster: Cluster, tmp_path: Path):
    first = batch(cluster, tmp_path, "exit $SLURM_ARRAY_TASK_ID", "--array=0-1")
    killed = batch(cluster, tmp_path, "true", f"--dependency=afterok:{first}", "--kill-on-invalid-dep=yes")
    runs = batch(cluster, tmp_path, "true", f"--dependency=afterany:{first}")
    assert cluster.ended(killed) == {killed: "CANCELLED"}
    assert plain(cluster, killed) == [f"{killed}|CANCELLED|DependencyNeverSatisfied"]
    assert cluster.ended(runs) == {runs: "COMPLETED"}

    # Without -j, sacct passes over what never started.
    def listed() -> set[str]:
        return set(cluster.run("sacct", "-X", "-n", "-P", "-o", "JobID,State").stdout.splitlines())

    cluster.wait_for(lambda: f"{runs}|COMPLETED" in listed(), 30)
    soon(lambda: rows(cluster, killed, "JobID,State"), [f"{killed}|CANCELLED"])
    assert f"{killed}|CANCELLED" not in listed()


def test_an_element_requeues_itself_and_its_partner_waits_for_the_second_attempt(cluster: Cluster, tmp_path: Path):
    body = REQUEUES_ITSELF.replace("TARGET", "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID")
    train = batch(cluster, tmp_path, body, "--hold", "--requeue", "--array=1-2", "--output=%A_%a.out")
    after = (f"--dependency=aftercorr:{train}", "--kill-on-invalid-dep=yes")
    test = batch(cluster, tmp_path, "true", "--array=1-2", *after)
    cluster.run("scontrol", "release", train)
    assert cluster.ended(test) == {f"{test}_1": "COMPLETED", f"{test}_2": "COMPLETED"}
    assert cluster.ended(train) == {f"{train}_1": "COMPLETED", f"{train}_2": "COMPLETED"}
    attempts = [f"{train}_1|COMPLETED", f"{train}_2|COMPLETED", f"{train}_2|REQUEUED"]
    soon(lambda: rows(cluster, train, "JobID,State", "-D"), attempts)
    assert rows(cluster, train, "JobID,State") == attempts[:2]
    assert restarts(cluster, train) == {f"{train}_1": 0, f"{train}_2": 1}
    # Where the signal meets `sleep` before the shell, the shell says so between the two attempts as well.
    first, *between, second = (tmp_path / f"{train}_2.out").read_text().splitlines()
    assert (first, second) == ("attempt 1", "attempt 2")
    says = rf"slurmstepd-n\d: error: \*\*\* JOB {train} ON n\d CANCELLED AT \S+ DUE TO JOB REQUEUE \*\*\*"
    assert sum(bool(re.fullmatch(says, line)) for line in between) == 1, between


def test_slurm_job_id_of_the_last_element_requeues_all_that_run(cluster: Cluster, tmp_path: Path):
    body = REQUEUES_ITSELF.replace("TARGET", "$SLURM_JOB_ID")
    job = batch(cluster, tmp_path, body, "--requeue", "--array=1-2")
    soon(lambda: restarts(cluster, job), {f"{job}_1": 1, f"{job}_2": 1})
    cluster.run("scancel", job)


def test_how_jobs_end_is_in_state_and_exit_code(cluster: Cluster, tmp_path: Path):
    endings = {"exit 3": "3:0", "kill -9 $$": "0:9", "exit 137": "9:0", "nosuchcommand": "127:0"}
    jobs = {batch(cluster, tmp_path, body): code for body, code in endings.items()}
    for job, code in jobs.items():
        assert cluster.ended(job) == {job: "FAILED"}
        soon(lambda: rows(cluster, job, "State,ExitCode"), [f"FAILED|{code}"])  # noqa: B023


def test_a_job_over_its_memory_fails_with_the_reason_in_its_output(cluster: Cluster, tmp_path: Path):
    body = "python3 -c 'import time; held = bytearray(300 << 20); time.sleep(60)'"
    job = batch(cluster, tmp_path, body, "--mem=50M", "--output=out")
    assert cluster.ended(job) == {job: "FAILED"}
    soon(lambda: rows(cluster, job, "State,ExitCode"), ["FAILED|0:9"])
    assert f"error: StepId={job}.batch exceeded memory limit (" in (tmp_path / "out").read_text()


def test_test_only_says_when_and_where_and_overlooks_the_partition_s_limit(cluster: Cluster, tmp_path: Path):
    def asked(*options: str) -> tuple[int, str, str]:
        done = cluster.run("sbatch", "--test-only", *options, "--wrap", "true", check=False)
        return done.returncode, done.stdout, done.stderr

    code, out, err = asked("--gres=gpu:1", "-c", "2")
    assert (code, out) == (0, "")
    found = TEST_ONLY.fullmatch(err)
    assert found and found.group(3, 5) == ("2", "gpu")
    code, _, err = asked("-p", "short", "-t", "60")
    assert code == 0 and TEST_ONLY.fullmatch(err)
    job = batch(cluster, tmp_path, "true", "-p", "short", "-t", "60")
    soon(lambda: cluster.squeue(job), [f"{job}|PENDING|PartitionTimeLimit"])
    cluster.run("scancel", job)
    unavailable = "allocation failure: Requested node configuration is not available\n"
    assert asked("--gres=gpu:9") == (1, "", unavailable)
    assert asked("-p", "none") == (
        1,
        "",
        "sbatch: error: invalid partition specified: none\nallocation failure: Invalid partition name specified\n",
    )


def test_pending_elements_that_are_cancelled_leave_no_trace(cluster: Cluster, tmp_path: Path):
    job = batch(cluster, tmp_path, "true", "--hold", "--array=0-3")
    cluster.run("scancel", f"{job}_[1-2]")
    assert plain(cluster, job) == [f"{job}_[0,3]|PENDING|JobHeldUser"]
    cluster.run("scontrol", "release", job)
    assert cluster.ended(job) == {f"{job}_0": "COMPLETED", f"{job}_3": "COMPLETED"}
    assert plain(cluster, job) == [f"{job}_0|COMPLETED|None", f"{job}_3|COMPLETED|None"]


def test_an_array_cancelled_while_it_waits_is_one_row(cluster: Cluster, tmp_path: Path):
    job = batch(cluster, tmp_path, "true", "--hold", "--array=0-3%2")
    cluster.run("scancel", job)
    uid = cluster.folder.stat().st_uid
    assert cluster.ended(job) == {f"{job}_[0-3%2]": "CANCELLED"}
    soon(lambda: rows(cluster, job, "JobID,State"), [f"{job}_[0-3%2]|CANCELLED by {uid}"])


def test_of_unknown_jobs_squeue_and_scontrol_fail_and_sacct_and_scancel_do_not(cluster: Cluster):
    def said(*command: str) -> tuple[int, str]:
        done = cluster.run(*command, check=False)
        return done.returncode, done.stderr

    assert said("squeue", "-j", "99999") == (1, "slurm_load_jobs error: Invalid job id specified\n")
    assert said("squeue", "-j", "99999,99998") == (0, "")
    assert said("scontrol", "release", "99999")[0] == 1
    assert said("scancel", "99999") == (0, "")
    assert said("sacct", "-j", "99999") == (0, "")


def test_an_urgent_job_requeues_others(tmp_path: Path):
    with Cluster(tmp_path / "one", nodes=1) as cluster:
        job = batch(cluster, tmp_path, "sleep 4", "--array=0-1", "--gres=gpu:1", "--output=%a.out")
        cluster.wait_for(lambda: len(cluster.squeue(job, "-t", "RUNNING")) == 2, 30)
        urgent = batch(cluster, tmp_path, "true", "-p", "urgent", "--gres=gpu:2")
        assert cluster.ended(urgent) == {urgent: "COMPLETED"}
        assert cluster.ended(job) == {f"{job}_0": "COMPLETED", f"{job}_1": "COMPLETED"}
        soon(lambda: rows(cluster, job, "State", "-D"), ["COMPLETED"] * 2 + ["PREEMPTED"] * 2)
        assert "DUE TO PREEMPTION ***" in (tmp_path / "0.out").read_text()


def test_each_element_of_an_array_counts_towards_the_submit_limit(tmp_path: Path):
    with Cluster(tmp_path / "limited", nodes=1, max_submit=10, max_array=101) as cluster:
        for options in ("--array=0-10",), ("--test-only", "--array=0-10"):
            refused = cluster.run("sbatch", *options, "--wrap", "true", check=False)
            assert refused.returncode == 1
            assert refused.stderr.startswith("sbatch: error: AssocMaxSubmitJobLimit\n") and TOO_MANY in refused.stderr
        job = batch(cluster, tmp_path, "true", "--hold", "--array=0-9%2")
        assert TOO_MANY in cluster.run("sbatch", "--wrap", "true", check=False).stderr
        cluster.run("scontrol", "release", job)
        cluster.ended(job)
        batch(cluster, tmp_path, "true", "--array=91-100")
        too_high = cluster.run("sbatch", "--array=101", "--wrap", "true", check=False)
        assert too_high.stderr == "sbatch: error: Batch job submission failed: Invalid job array specification\n"


def test_a_dependency_on_a_job_that_slurm_has_forgotten_counts_as_fulfilled_though_it_failed(tmp_path: Path):
    with Cluster(tmp_path / "forgets", nodes=1, min_job_age=2) as cluster:
        failed = batch(cluster, tmp_path, "exit 1", "--array=0-1")
        cluster.wait_for(lambda: cluster.run("squeue", "-t", "all", "-j", failed, check=False).returncode == 1, 60)
        for kind in ("afterok", "aftercorr"):
            after = (f"--dependency={kind}:{failed}", "--kill-on-invalid-dep=yes")
            job = batch(cluster, tmp_path, "echo runs", "--array=0-1", f"--output={kind}-%a", *after)
            for i in range(2):
                cluster.wait_for((tmp_path / f"{kind}-{i}").exists, 30, f"{kind} {job}")
        soon(lambda: rows(cluster, failed, "JobID,State"), [f"{failed}_0|FAILED", f"{failed}_1|FAILED"])


def test_jobs_of_a_node_that_dies_are_requeued_or_end_as_they_asked(tmp_path: Path):
    with Cluster(tmp_path / "dies") as cluster:
        body = 'echo attempt $((${SLURM_RESTART_COUNT:-0} + 1)); [ -n "$SLURM_RESTART_COUNT" ] || sleep 1000'
        again = batch(cluster, tmp_path, body, "-w", "n1", "--array=0-1", "--requeue", "--output=%a.out")
        never = batch(cluster, tmp_path, body, "-w", "n1", "--no-requeue")
        cluster.wait_for(lambda: len(cluster.squeue(f"{again},{never}", "-t", "RUNNING")) == 3, 30)
        cluster.wait_for((tmp_path / "1.out").exists, 30)
        cluster.kill_node("n1")
        assert cluster.ended(never) == {never: "NODE_FAIL"}
        assert plain(cluster, never) == [f"{never}|NODE_FAIL|NodeDown"]
        assert cluster.node_states() == {"n1": "down*", "n2": "idle"}
        waiting = {line.split("|", 1)[1] for line in cluster.squeue(again)}
        assert waiting <= {"PENDING|BeginTime", "PENDING|ReqNodeNotAvail, UnavailableNodes:n1"}
        cluster.start_node("n1")
        assert cluster.ended(again) == {f"{again}_0": "COMPLETED", f"{again}_1": "COMPLETED"}
        soon(lambda: rows(cluster, again, "State", "-D"), ["COMPLETED"] * 2 + ["NODE_FAIL"] * 2)
        assert restarts(cluster, again) == {f"{again}_0": 1, f"{again}_1": 1}
        assert (tmp_path / "1.out").read_text() == "attempt 1\nattempt 2\n"


def test_a_signal_reaches_the_trap_of_the_batch_script(cluster: Cluster, slow: Slow):
    assert cluster.ended(slow.signalled, 100) == {slow.signalled: "FAILED"}
    soon(lambda: rows(cluster, slow.signalled, "State,ExitCode"), ["FAILED|75:0"])
    assert (slow.folder / "signalled.out").read_text() == "saved\n"


def test_a_time_limit_is_written_into_the_log_behind_the_link_and_fails_what_waits(cluster: Cluster, slow: Slow):
    job = slow.timeout
    assert cluster.ended(job, 150) == {f"{job}_0": "TIMEOUT", f"{job}_1": "TIMEOUT"}
    soon(lambda: rows(cluster, job, "State,ExitCode"), ["TIMEOUT|0:0"] * 2)
    assert {row["ExitCode"] for row in cluster.sacct(job) if row["JobID"].endswith(".batch")} == {"0:15"}
    said, slurm = (slow.folder / "runs" / "1B_rank8" / f"slurm-{job}_1.out").read_text().splitlines()
    assert said == "hi"
    assert re.fullmatch(
        r"slurmstepd-n\d: error: \*\*\* JOB \d+ ON n\d CANCELLED AT \S+ DUE TO TIME LIMIT \*\*\*", slurm
    )
    never = [f"{slow.waits}_[0-1]|PENDING|DependencyNeverSatisfied"]
    soon(lambda: cluster.squeue(slow.waits), never)
    cluster.run("scancel", slow.waits)
