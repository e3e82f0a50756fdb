"""What slurm/job.sh makes of exit codes, signals and failures, on a real Slurm with small commands."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.slurm.conftest import Submit
from tests.slurm.lab import SlurmLab


def script(path: Path, text: str) -> str:
    path.write_text("#!/bin/bash\n" + text)
    path.chmod(0o755)
    return str(path)


def test_an_array_worker_that_fails_once_is_run_again(lab: SlurmLab, submit: Submit, tmp_path: Path) -> None:
    """A gap in the array, as when a few workers are submitted again: the numbers stay within the count."""
    worker = script(
        tmp_path / "worker",
        f"""cd {tmp_path}; echo "$@"; i=${{2%/*}}
if [ "$i" = 1 ] && [ ! -e tried ]; then touch tried; exit 7; fi
touch "shard$i"
""",
    )
    array = submit("rollouts", worker, options=("--array=0,1,3",))
    after = submit("dataset", "ls", str(tmp_path), options=(f"--dependency=afterok:{array}",))

    assert lab.wait(after)["JobState"] == "COMPLETED"  # afterok waited for the retry
    assert [lab.job(f"{array}_{i}")["Restarts"] for i in (0, 1, 3)] == ["0", "1", "0"]
    assert {path.name for path in tmp_path.glob("shard*")} == {"shard0", "shard1", "shard3"}
    logs = tmp_path / "logs/rollouts"
    assert {path.name for path in logs.iterdir() if not path.is_symlink()} == {
        f"{array}_0.0",
        f"{array}_1.0",
        f"{array}_1.1",
        f"{array}_3.0",
    }
    assert (logs / "latest_1").readlink() == Path(f"{array}_1.1")
    assert (logs / "latest_1/node-0.log").read_text() == "--worker 1/4\n"


def test_a_broken_job_is_not_requeued_for_ever(lab: SlurmLab, submit: Submit, tmp_path: Path) -> None:
    """A failure is retried once, wrong input is not, and early stops are bounded too."""
    restarts = {1: 1, 2: 0, 85: 1}
    broken = {code: submit("train", "bash", "-c", f"exit {code}", restarts=1, retries=1) for code in restarts}
    after = submit("export", "true", options=(f"--dependency=afterok:{broken[1]}",))
    later = submit("evaluate", "true", options=(f"--dependency=afterok:{after}",))
    for code, job in broken.items():
        record = lab.wait(job)
        assert (record["JobState"], record["ExitCode"]) == ("FAILED", f"{code}:0")
        assert record["Restarts"] == str(restarts[code])
        assert len(list((tmp_path / "logs/train").glob(f"{job}.*"))) == restarts[code] + 1
    # --kill-on-invalid-dep in the sbatch files: a broken chain ends instead of pending for ever
    assert lab.wait(after)["JobState"] == "CANCELLED"
    assert lab.wait(later)["JobState"] == "CANCELLED"


def test_an_early_stop_goes_on_before_the_next_stage(lab: SlurmLab, submit: Submit, tmp_path: Path) -> None:
    order = tmp_path / "order"
    trainer = script(
        tmp_path / "trainer", f'echo train >> {order}; [ "$(wc -l < {order})" -ge 2 ] || exit 85\n'
    )
    train = submit("train", trainer, retries=0)
    export = submit(
        "export", "bash", "-c", f"echo export >> {order}", options=(f"--dependency=afterok:{train}",)
    )
    assert lab.wait(export)["JobState"] == "COMPLETED"
    assert order.read_text().split() == ["train", "train", "export"]
    assert lab.job(train)["Restarts"] == "1"
    # the batch log is appended to, and says what happened
    log = (tmp_path / f"train-{train}_4294967294.batch.log").read_text()
    assert log.count("exit code 85: requeue") == 1
    assert "attempt 1: done" in log


@pytest.mark.skipif(torch.cuda.is_available(), reason="the nodes of the lab have GPUs in name only")
def test_the_health_check_names_the_bad_nodes(lab: SlurmLab, submit: Submit, tmp_path: Path) -> None:
    """The lab's GPUs are /dev/null. Training does not start."""
    options = ("--nodes=2", "--gpus-per-node=1", "--export=ALL,LOPD_HEALTH_CHECK=1")
    job = submit("train", "touch", f"{tmp_path}/trained", options=options, retries=0)
    assert lab.wait(job, 300)["JobState"] == "FAILED"
    log = (tmp_path / f"train-{job}_4294967294.batch.log").read_text()
    assert "node n1: 0 of 1 GPUs are visible" in log
    assert "node n2: 0 of 1 GPUs are visible" in log
    assert not (tmp_path / "trained").exists()


def test_term_on_srun_leaves_no_time_to_save(lab: SlurmLab, tmp_path: Path) -> None:
    """Why job.sh sends USR1: SIGTERM makes srun kill its tasks on the spot."""
    worker = script(
        tmp_path / "worker",
        f'trap "sleep 2; touch {tmp_path}/saved; exit 0" TERM; touch {tmp_path}/up\n'
        "while :; do sleep 0.1; done\n",
    )
    batch = script(
        tmp_path / "batch",
        f"srun {worker} & srun=$!\nuntil [ -e {tmp_path}/up ]; do sleep 0.1; done\n"
        "kill -TERM $srun; wait $srun\n",
    )
    job = lab.run(["sbatch", "--parsable", f"--output={tmp_path}/log", batch], cwd=tmp_path).stdout.strip()
    assert lab.wait(job)["JobState"] in ("FAILED", "COMPLETED")
    assert not (tmp_path / "saved").exists()
