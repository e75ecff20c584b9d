"""A throw-away Slurm cluster on this machine, real in every part: MariaDB, slurmdbd, slurmctld and a slurmd a node.

    with Cluster(folder) as cluster:
        cluster.run("sbatch", "--wrap=hostname")

It needs Debian's packages, no root, no munge and no fixed port, so that several may run at once. A keeper (keeper.py)
holds each daemon, and nothing of it outlives this process. For a machine of your own: with auth/none, whoever is on
the same machine and finds the port may run jobs as you.
"""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self, TypeVar

T = TypeVar("T")
PACKAGES = "slurm-wlm slurmdbd mariadb-server"
KEEPER = Path(__file__).with_name("keeper.py")
LIVE = {"PENDING", "RUNNING", "REQUEUED", "COMPLETING", "CONFIGURING"}
OTHER_SLURM = ("SLURM_", "SLURMD_", "SBATCH_", "SQUEUE_", "SACCT_", "SINFO_", "SCANCEL_")
# Debian keeps the daemons where only root looks.
PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin"
GPUS_PER_NODE = 2
# Two character devices that every Linux has: gres takes nothing else for a GPU, but a link to one will do.
DEVICES = ("/dev/null", "/dev/zero")

SLURM_CONF = """\
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
# Without it a requeued job waits for two minutes until its old credential has run out.
AuthInfo=cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
PlugStackConfig={folder}/plugstack.conf
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
PropagateResourceLimits=NONE
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=10000,bf_interval=1,defer_batch
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
PriorityType=priority/basic
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill,UsePss
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={dbd_port}
AccountingStorageTRES=gres/gpu
AccountingStoreFlags=job_comment
AccountingStorageEnforce=limits
MaxArraySize={max_array}
MaxJobCount=20000
GresTypes=gpu
# A dead node is seen after this many seconds.
SlurmdTimeout=6
MessageTimeout=3
ReturnToService=2
# The nodes claim more than the machine has.
SlurmdParameters=config_overrides
KillWait=2
MinJobAge={min_job_age}
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={nodes} NodeHostname={host} NodeAddr=127.0.0.1 Port={node_ports} CPUs={cpus} RealMemory=64000 Gres=gpu:h100:2
PartitionName=gpu Nodes=ALL Default=YES MaxTime=1-00:00:00 DefaultTime=00:05:00 DefMemPerCPU=500
PartitionName=short Nodes=ALL MaxTime=00:10:00 DefaultTime=00:05:00 DefMemPerCPU=500
PartitionName=urgent Nodes=ALL MaxTime=00:10:00 DefaultTime=00:05:00 DefMemPerCPU=500 PriorityTier=10
"""
GRES_CONF = "NodeName={nodes} Name=gpu Type=h100 File={folder}/dev/gpu[0-1]\n"
SLURMDBD_CONF = """\
AuthType=auth/none
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort={dbd_port}
SlurmUser={user}
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser={user}
StorageLoc=slurm
PidFile={folder}/slurmdbd.pid
CommitDelay=1
"""
# No table of rights, and of the system's tables only the one of procedures, which slurmdbd needs: up in 0.3 s, where
# mariadb-install-db alone takes 2 to 8 s.
SYSTEM_TABLES = Path("/usr/share/mysql/mysql_system_tables.sql")
MARIADB = (
    "mariadbd --no-defaults --user={user} --datadir={folder}/db --socket={folder}/db.sock --tmpdir={folder}/tmp "
    "--skip-networking --skip-grant-tables --skip-log-bin --innodb-buffer-pool-size=32M --innodb-log-file-size=8M "
    "--innodb-flush-log-at-trx-commit=0 --init-file={folder}/db.sql"
)


def missing_programs() -> list[str]:
    """The daemons that this machine does not have."""
    return [name for name in ("slurmctld", "slurmd", "slurmdbd", "mariadbd") if not shutil.which(name, path=PATH)]


def reserve_ports(count: int) -> list[socket.socket]:
    """Sockets bound to free ports: nobody else is given these while they are open, and Slurm may still listen there."""
    sockets = []
    for _ in range(count):
        held = socket.socket()
        held.bind(("127.0.0.1", 0))
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # only now: two such binds must not get one port
        sockets.append(held)
    return sockets


class Cluster:
    """Nodes n1, n2, ... of `cpus` CPUs and two GPUs each; partitions gpu (the default, a day), short (ten minutes) and
    urgent (which requeues jobs of the others). `max_submit` limits how many jobs the user may have in the queue,
    `max_array` is one more than the highest index of an array, and slurmctld forgets a job some seconds after it has
    been ended for `min_job_age` seconds."""

    def __init__(
        self,
        folder: Path,
        *,
        nodes: int = 2,
        cpus: int = 16,
        max_submit: int | None = None,
        max_array: int = 1001,
        min_job_age: int = 300,
    ) -> None:
        self.folder = folder.absolute()
        self.nodes = [f"n{i + 1}" for i in range(nodes)]
        self.cpus = cpus
        self.max_submit = max_submit
        self.max_array = max_array
        self.min_job_age = min_job_age
        self.keepers: dict[str, subprocess.Popen[bytes]] = {}
        self.held_ports: list[socket.socket] = []

    @property
    def env(self) -> dict[str, str]:
        """What a child, or a test by monkeypatch, needs to talk to this cluster and no other."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": PATH}

    def environment(self) -> dict[str, str]:
        """This process's, less what it may have of another Slurm, whose job it may be."""
        return {name: value for name, value in os.environ.items() if not name.startswith(OTHER_SLURM)} | self.env

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Up, with all nodes idle, in about four seconds; an AssertionError with the ends of the logs if not."""
        self.write_files()
        facts = {"folder": self.folder, "user": getpass.getuser()}
        self.keep("mariadbd", *MARIADB.format(**facts).split())
        self.wait_for((self.folder / "db.sock").exists, 60, "mariadbd")
        self.keep("slurmdbd", "slurmdbd", "-D")
        self.wait_for(lambda: self.run("sacctmgr", "list", "cluster", check=False).returncode == 0, 60, "slurmdbd")
        self.run("sacctmgr", "-i", "add", "cluster", "lab")
        self.run("sacctmgr", "-i", "add", "account", "lab")
        self.run("sacctmgr", "-i", "add", "user", getpass.getuser(), "Account=lab")
        if self.max_submit is not None:  # in all accounts: root has another one from the start
            self.run("sacctmgr", "-i", "modify", "user", getpass.getuser(), "set", f"MaxSubmitJobs={self.max_submit}")
        self.keep("slurmctld", "slurmctld", "-D")
        for name in self.nodes:
            self.start_node(name)
        self.wait_for(lambda: set(self.node_states().values()) == {"idle"}, 60, "idle nodes")

    def stop(self) -> None:
        """Kills everything at once, jobs included; in well under a second, and nothing stays."""
        for name in list(self.keepers):
            self.drop(name)
        for held in self.held_ports:
            held.close()

    def run(self, *command: str | Path, check: bool = True, seconds: float = 60) -> subprocess.CompletedProcess[str]:
        """A command of Slurm's, with its output as text; AssertionError with what it said if it fails and `check`."""
        done = subprocess.run(
            command, env=self.environment(), capture_output=True, text=True, timeout=seconds, check=False
        )
        assert not check or done.returncode == 0, f"{command} said: {done.stdout}{done.stderr}"
        return done

    def submit(self, *arguments: str | Path) -> str:
        """The id of a new batch job."""
        return self.run("sbatch", "--parsable", *arguments).stdout.strip()

    def squeue(self, job_id: str, *options: str, fields: str = "%i|%T|%r") -> list[str]:
        """What waits or runs of a job, a line each."""
        return self.run("squeue", "-h", "-j", job_id, "-o", fields, *options).stdout.splitlines()

    def sacct(self, job_id: str, *options: str, fields: str = "JobID,State,ExitCode,Reason") -> list[dict[str, str]]:
        """What accounting knows of a job, a row for each array element (and step, unless `-X` is among the options)."""
        lines = self.run("sacct", "-P", "-j", job_id, "-o", fields, *options).stdout.splitlines()
        names = lines[0].split("|")
        return [dict(zip(names, line.split("|"), strict=True)) for line in lines[1:]]

    def ended(self, job_id: str, seconds: float = 60) -> dict[str, str]:
        """The state of each element of a job once none waits or runs, by squeue: sacct may lag by seconds."""

        def ends() -> dict[str, str]:
            lines = self.squeue(job_id, "-t", "all", fields="%i|%T")
            states = {name: state for name, state in (line.split("|") for line in lines)}
            return {} if LIVE & {*states.values()} else states

        return self.wait_for(ends, seconds, f"end of {job_id}")

    def node_states(self) -> dict[str, str]:
        lines = self.run("sinfo", "-h", "-N", "-p", "gpu", "-o", "%N %T", check=False, seconds=10).stdout.splitlines()
        return {name: state for name, state in (line.split() for line in lines)}

    def wait_for(self, condition: Callable[[], T], seconds: float, what: str = "condition") -> T:
        """The first true answer, asked ten times a second; AssertionError with the ends of the logs after `seconds`."""
        give_up = time.monotonic() + seconds
        while not (answer := condition()):
            assert time.monotonic() < give_up, f"no {what} after {seconds} s\n{self.ends_of_logs()}"
            ended = [name for name, keeper in self.keepers.items() if keeper.poll() is not None]
            assert not ended, f"{ended} ended\n{self.ends_of_logs()}"
            time.sleep(0.1)
        return answer

    def kill_node(self, name: str) -> None:
        """As when the power fails: slurmd, slurmstepd and the jobs' processes end at once, and nobody is told."""
        self.drop(f"slurmd.{name}")

    def start_node(self, name: str) -> None:
        self.keep(f"slurmd.{name}", "slurmd", "-D", "-N", name)

    def keep(self, name: str, *command: str) -> None:
        """Starts a daemon under a keeper, its output in log/NAME."""
        with (self.folder / "log" / name).open("ab") as log:
            self.keepers[name] = subprocess.Popen(
                [sys.executable, "-IS", str(KEEPER), *command],
                env=self.environment() | {"MYSQL_UNIX_PORT": str(self.folder / "db.sock")},
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def drop(self, name: str) -> None:
        keeper = self.keepers.pop(name)
        assert keeper.stdin
        keeper.stdin.close()
        keeper.wait()

    def write_files(self) -> None:
        self.folder.mkdir(mode=0o700)  # whoever reaches the socket may do all in the database
        for name in ("db/mysql", "dev", "log", "spool", "state", "tmp", *(f"spool/{name}" for name in self.nodes)):
            (self.folder / name).mkdir(parents=True)
        for i in range(GPUS_PER_NODE):
            (self.folder / "dev" / f"gpu{i}").symlink_to(DEVICES[i])
        self.held_ports = reserve_ports(2 + len(self.nodes))
        ctld, dbd, *of_nodes = (held.getsockname()[1] for held in self.held_ports)
        facts = {
            "folder": self.folder,
            "user": getpass.getuser(),
            "host": socket.gethostname().split(".")[0],
            "ctld_port": ctld,
            "dbd_port": dbd,
            "nodes": ",".join(self.nodes),
            "node_ports": ",".join(str(port) for port in of_nodes),
            "cpus": self.cpus,
            "max_array": self.max_array,
            "min_job_age": self.min_job_age,
        }
        (self.folder / "slurm.conf").write_text(SLURM_CONF.format(**facts))
        (self.folder / "gres.conf").write_text(GRES_CONF.format(**facts))
        (self.folder / "plugstack.conf").touch()
        tables = SYSTEM_TABLES.read_text().splitlines()
        procedures = next(line for line in tables if line.startswith("CREATE TABLE IF NOT EXISTS proc "))
        (self.folder / "db.sql").write_text(f"USE mysql;\n{procedures}\n")
        dbd_conf = self.folder / "slurmdbd.conf"
        dbd_conf.touch(mode=0o600)  # slurmdbd reads no other
        dbd_conf.write_text(SLURMDBD_CONF.format(**facts))

    def ends_of_logs(self) -> str:
        logs = sorted((self.folder / "log").iterdir())
        return "\n".join(f"{log.name}: ...{log.read_text(errors='replace')[-600:]}" for log in logs)
