"""A real Slurm on the loopback device: munged, slurmctld and N slurmd, as children of this process.

Everything lies below one short temporary folder, ports are chosen by the kernel, and every process is ended
by its id. Nodes n1, n2, … share one address, so their names do not resolve: as on a badly set up cluster.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

PROGRAMS = ("munged", "mungekey", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
GPUS = 2
SEARCH = "/usr/sbin:/usr/bin:/sbin:/bin"

CONF = """\
ClusterName=lab
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# Slurm holds a requeued job back for cred_expire + 1 seconds; 5 is the least that it takes.
AuthInfo=socket={base}/run/munge.sock,cred_expire=5
StateSaveLocation={base}/state
SlurmdSpoolDir={base}/spool-%n
SlurmctldPidFile={base}/run/slurmctld.pid
SlurmdPidFile={base}/run/slurmd-%n.pid
SlurmctldLogFile={base}/log/slurmctld.log
SlurmdLogFile={base}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=200000,batch_sched_delay=0
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
SlurmdParameters=config_overrides
KillWait={kill_wait}
MinJobAge=7200
GresTypes=gpu
{nodes}
PartitionName=debug Nodes={names} Default=YES MaxTime=INFINITE State=UP
# Powered down nodes that never start: big enough for `sbatch --test-only` of a real cluster's jobs.
SuspendProgram=/bin/true
ResumeProgram=/bin/true
SuspendTime=INFINITE
NodeName=big[1-64] State=CLOUD CPUs=64 RealMemory=1000000 Gres=gpu:8
PartitionName=big Nodes=big[1-64] MaxTime=INFINITE State=UP
"""

# NeMo-Run asks sacct for the state of a job. This lab has no accounting database, scontrol knows the same.
SACCT = r"""#!/bin/bash
ids=$(sed -n 's/.*-j *\([0-9_,]*\).*/\1/p' <<<"$*")
echo "JobID|JobName|Partition|Account|AllocCPUS|State|ExitCode"
scontrol show job -o "$ids" | sed -nE \
  's/^JobId=([0-9]+).* JobName=(\S+).* JobState=(\S+).* ExitCode=(\S+).*/\1|\2|debug|lab|1|\3|\4/p'
"""


def missing() -> list[str]:
    """The programs of Slurm that this machine lacks."""
    return [name for name in PROGRAMS if shutil.which(name, path=SEARCH) is None]


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _end_with_parent() -> None:
    """Ask the kernel for SIGTERM when the tests are killed, so that no daemon outlives them."""
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


class SlurmLab:
    """Context manager. `env` holds SLURM_CONF and a PATH; pass it to every client."""

    def __init__(self, nodes: int = 2, cpus: int = 8, kill_wait: int = 5) -> None:
        self.names = [f"n{i + 1}" for i in range(nodes)]
        self.cpus = cpus
        self.kill_wait = kill_wait
        self.daemons: list[tuple[str, subprocess.Popen[bytes], IO[bytes]]] = []

    def __enter__(self) -> SlurmLab:
        # Not pytest's tmp_path: munged wants every parent of its socket open (o+x), and a short path.
        self.base = Path(tempfile.mkdtemp(prefix="lab-", dir="/tmp"))
        self.base.chmod(0o755)
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        for name in ("log", "run", "state", "bin", "munge", *(f"spool-{n}" for n in self.names)):
            (self.base / name).mkdir(mode=0o700 if name == "munge" else 0o755)
        self._write_config()
        base, conf = self.base, self.env["SLURM_CONF"]
        self.run(["mungekey", "--create", f"--keyfile={base}/munge/key"])
        self._spawn(
            "munged",
            *("-F", f"--key-file={base}/munge/key", f"--socket={base}/run/munge.sock", "--num-threads=2"),
            *(f"--pid-file={base}/run/munged.pid", f"--seed-file={base}/munge/seed"),
            f"--log-file={base}/log/munged.log",
        )
        self.until("munge socket", (base / "run/munge.sock").exists)
        self._spawn("slurmctld", "-D", "-f", conf)
        self.until("slurmctld", lambda: self.run(["scontrol", "ping"], check=False).returncode == 0)
        for name in self.names:
            self._spawn("slurmd", "-D", "-N", name, "-f", conf)
        self.until("idle nodes", lambda: list(self.node_states().values()) == ["idle"] * len(self.names))

    def _write_config(self) -> None:
        ports = free_ports(1 + len(self.names))
        nodes = "\n".join(
            f"NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} "
            f"CPUs={self.cpus} RealMemory=4000 Gres=gpu:{GPUS}"
            for name, port in zip(self.names, ports[1:], strict=True)
        )
        user = pwd.getpwuid(os.geteuid()).pw_name
        conf = self.base / "slurm.conf"
        conf.write_text(
            CONF.format(
                base=self.base,
                ports=ports,
                user=user,
                nodes=nodes,
                names=",".join(self.names),
                kill_wait=self.kill_wait,
            )
        )
        for i in range(GPUS):  # a GPU must be a character device
            (self.base / f"run/gpu{i}").symlink_to("/dev/null")
        (self.base / "gres.conf").write_text(
            "AutoDetect=off\n"
            f"NodeName={','.join(self.names)} Name=gpu File={self.base}/run/gpu[0-{GPUS - 1}]\n"
            "NodeName=big[1-64] Name=gpu Count=8\n"
        )
        # slurmd opens a cgroup plugin although it tracks processes by /proc; v1 needs nothing mounted.
        (self.base / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        sacct = self.base / "bin/sacct"
        sacct.write_text(SACCT)
        sacct.chmod(0o755)
        self.env = os.environ | {
            "SLURM_CONF": str(conf),
            "PATH": f"{self.base}/bin:{os.environ.get('PATH', '')}:{SEARCH}",
        }

    def _spawn(self, program: str, *arguments: str) -> None:
        log = (self.base / f"log/{program}.out").open("ab")
        path = shutil.which(program, path=SEARCH)
        assert path is not None
        process = subprocess.Popen(
            [path, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=self.env,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
        self.daemons.append((program, process, log))

    def until(
        self, what: str, ready: Callable[[], bool], timeout_s: float = 20, every_s: float = 0.05
    ) -> None:
        """Wait for a condition; fails at once when a daemon has died."""
        end = time.monotonic() + timeout_s
        while not ready():
            for name, process, _ in self.daemons:
                assert process.poll() is None, f"{name} ended with {process.returncode}\n{self.logs()}"
            assert time.monotonic() < end, f"no {what} after {timeout_s} s\n{self.logs()}"
            time.sleep(every_s)

    def logs(self) -> str:
        return "\n".join(f"{path.name}: {path.read_text()[-800:]}" for path in self.base.glob("log/*"))

    def run(
        self,
        command: Sequence[str],
        *,
        check: bool = True,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        timeout_s: float = 120,
    ) -> subprocess.CompletedProcess[str]:
        """Run a client to its end; stdout and stderr together as text. `env` adds to the environment."""
        result = subprocess.run(
            command,
            env=self.env | dict(env or {}),
            cwd=cwd,
            timeout=timeout_s,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert not (check and result.returncode), f"{command}: {result.returncode}\n{result.stdout}"
        return result

    def node_states(self) -> dict[str, str]:
        lines = self.run(["sinfo", "-h", "-N", "-p", "debug", "-o", "%N %T"], check=False).stdout.splitlines()
        return dict(line.split(maxsplit=1) for line in lines if line.startswith("n"))

    def job(self, job: str) -> dict[str, str]:
        """`scontrol show job` of one job or one array task (`12_3`)."""
        text = self.run(["scontrol", "show", "job", "-o", job]).stdout
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def wait(self, job: str, timeout_s: float = 120) -> dict[str, str]:
        """Wait until a job has ended for good; returns its record."""
        ended = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "OUT_OF_MEMORY")
        end = time.monotonic() + timeout_s
        while (record := self.job(job))["JobState"] not in ended:
            assert time.monotonic() < end, (
                f"job {job} still {record['JobState']} after {timeout_s} s: {record}"
            )
            time.sleep(0.4)  # asking costs the CPU that the jobs want
        return record

    def __exit__(self, *error: object) -> None:
        if any(name == "slurmd" for name, _, _ in self.daemons):
            self.run(["scancel", "--full", "-s", "KILL", "-u", str(os.geteuid())], check=False)
            self.run(["scancel", "-u", str(os.geteuid())], check=False)
            end = time.monotonic() + 5
            while self.run(["squeue", "-h"], check=False).stdout.strip() and time.monotonic() < end:
                time.sleep(0.1)
        for _, process, log in reversed(self.daemons):
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            log.close()
        self._end_step_daemons()
        if not os.environ.get("LOPD_KEEP_LAB"):
            shutil.rmtree(self.base, ignore_errors=True)

    def _end_step_daemons(self) -> None:
        """A slurmstepd outlives its slurmd. Ours are those whose environment names our slurm.conf."""
        mine = f"SLURM_CONF={self.base}/slurm.conf".encode()
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                a_step = (folder / "comm").read_text().startswith("slurmstepd")
                if a_step and mine in (folder / "environ").read_bytes().split(b"\0"):
                    os.kill(int(folder.name), signal.SIGKILL)
            except OSError:
                continue  # it has ended by itself
