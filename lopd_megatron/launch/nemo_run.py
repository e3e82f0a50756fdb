"""The chain through NeMo-Run, which launches the same commands (`run.Script`) and nothing else.

    lopd run RECIPE --on nemo|nemo-local ...
    python -m lopd_megatron.launch.nemo_run --factory tiny_lightning_opd where=slurm --yes

The second form is NeMo-Run's own command line; every function of recipes/*.py is a factory there. This is the
only file that imports nemo_run. Facts that shape it (NeMo-Run 0.11.1):

* an Experiment with failed tasks leaves exit code 0, so the statuses are judged here;
* LocalExecutor goes on after a failed task, so locally each stage is an Experiment of its own;
* it waits for ever for a job array, so each worker of an array stage is a task;
* its retries know no exit codes, so its `srun` is judged by slurm/job.sh, like that of the sbatch files;
* its torchrun launcher has one fixed port, so the command brings its own launcher;
* its command line reads annotations as types, so this file does without `from __future__ import annotations`.
"""

import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lopd_megatron.errors import EXIT_REQUEUE, UserError, run_program
from lopd_megatron.imports import quick_imports
from lopd_megatron.launch import sbatch, shell
from lopd_megatron.launch.stages import WARNING_S, Stage, chain, refuse_short_time

JUDGED_SRUN = """\
srun() {
  local code=0
  command srun "$@" || code=$?
  [ "$code" = 0 ] || finish "$code"
}"""


def run(stages: Sequence[Stage], executor: str, *, dry_run: bool = False) -> int:
    """Run the chain on NeMo-Run's `local` or `slurm` executor and wait. 0 only if every task succeeded."""
    home = (stages[-1].config.paths.logs / "nemorun").absolute()
    for text in (str(home), *(_checkout(stage) for stage in stages), *(stage.run for stage in stages)):
        if "/nemo_run" in text:
            raise UserError(f"{text}: NeMo-Run replaces the text /nemo_run in its scripts; use another path")
        if shlex.quote(text) != text:
            raise UserError(f"{text!r}: NeMo-Run does not quote blanks and the like; use another name")
    os.environ["PATH"] = shell.environment()["PATH"]
    if dry_run and executor == "local":
        print("\n".join(shell.lines(stages)))
        return 0
    if dry_run:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["NEMORUN_HOME"] = folder  # read when nemo_run is imported
            print(_scripts(stages).replace(folder, str(home)))
        return 0
    os.environ["NEMORUN_HOME"] = str(home)
    with quick_imports():
        from nemo_run.config import set_nemorun_home

    set_nemorun_home(str(home))  # its own command line has imported it before
    if executor == "slurm":
        _prepare_sbatch()
        return _run_experiment(stages, executor)
    for stage in stages:
        if code := _run_experiment([stage], executor):
            return code
    return 0


def _prepare_sbatch() -> None:
    """As sbatch.py: jobs get the environment, but not the variables of a job that this process may be in."""
    os.environ["SBATCH_EXPORT"] = "ALL"
    if "SLURM_JOB_ID" in os.environ:
        for name in [name for name in os.environ if name.startswith("SLURM_") and name != "SLURM_CONF"]:
            del os.environ[name]


def _run_experiment(stages: Sequence[Stage], executor: str) -> int:
    import nemo_run

    with nemo_run.Experiment(stages[-1].run, skip_status_at_exit=True) as experiment:
        _add(experiment, stages, executor)
        # Locally the workers of an array take turns, as in a shell: they share the machine's GPUs.
        experiment.run(sequential=executor == "local" and len(experiment.jobs) > 1)
    failed = {
        name: str(task["status"])
        for name, task in experiment.status(return_dict=True).items()
        if str(task["status"]) != "SUCCEEDED"
    }
    for name, status in failed.items():
        print(f"{name}: {status}")
    return 1 if failed else 0


def _scripts(stages: Sequence[Stage]) -> str:
    """The batch scripts that would be submitted, and the scripts that they run."""
    import nemo_run

    with nemo_run.Experiment(stages[-1].run, skip_status_at_exit=True) as experiment:
        names = _add(experiment, stages, "slurm")
        experiment.dryrun(log=False, delete_exp_dir=False)
    folder = Path(experiment._exp_dir)
    files = [path for name in names for path in (f"{name}_sbatch.sh", f"{name}/scripts/{name}.sh")]
    return "\n".join(f"# {file}\n{(folder / file).read_text()}" for file in files)


def _add(experiment: Any, stages: Sequence[Stage], executor: str) -> list[str]:
    """Add every command as a task; returns the names of the tasks."""
    import nemo_run

    make = {"local": _local_executor, "slurm": _slurm_executor}[executor]
    tasks: dict[str, list[str]] = {}
    for stage in stages:
        commands = stage.worker_commands()
        names = [stage.job if len(commands) == 1 else f"{stage.job}-{i}" for i in range(len(commands))]
        after = [task for job in stage.after for task in tasks.get(job, [])]
        tasks[stage.job] = [
            experiment.add(
                nemo_run.Script(inline=_script(stage, command, executor)),
                executor=make(stage),
                name=name,
                dependencies=after or None,
            )
            for name, command in zip(names, commands, strict=True)
        ]
    return [task for names in tasks.values() for task in names]


def _script(stage: Stage, command: Sequence[str], executor: str) -> str:
    """What a task runs: the command in the checkout. NeMo-Run starts tasks in a folder of its own."""
    line = shlex.join(command)
    folder = shlex.quote(_checkout(stage))
    if executor == "slurm":
        _prepare_sbatch()
        return f"cd {folder}\nexec {line}\n"
    attempts = stage.config.launch.max_restarts + 1
    again = f"for _ in $(seq {attempts}); do\n{line}\ncode=$?\n[ $code = {EXIT_REQUEUE} ] || break\ndone"
    return f"cd {folder}\n{again}\nexit $code\n"


def _checkout(stage: Stage) -> str:
    launch = stage.config.launch
    if launch.ssh_host and not launch.ssh_checkout:
        raise UserError(
            f"launch.ssh_host={launch.ssh_host} needs launch.ssh_checkout, the checkout's path there"
        )
    return launch.ssh_checkout or os.getcwd()


def _local_executor(stage: Stage) -> Any:
    import nemo_run

    return nemo_run.LocalExecutor()


def _slurm_executor(stage: Stage) -> Any:
    """Fields of SlurmExecutor from the recipe's launch section."""
    import nemo_run

    refuse_short_time(stage)
    launch, resources = stage.config.launch, stage.resources
    checkout = _checkout(stage)
    tunnel = nemo_run.LocalTunnel(job_dir="")
    if launch.ssh_host:
        user, _, host = launch.ssh_host.rpartition("@")
        tunnel = nemo_run.SSHTunnel(host=host, user=user, job_dir=f"{checkout}/nemorun")
    parameters: dict[str, Any] = {"kill_on_invalid_dep": "yes"}
    for option in launch.sbatch_options:
        name, equals, value = option.removeprefix("--").partition("=")
        if not option.startswith("--"):
            raise UserError(
                f"launch.sbatch_options: NeMo-Run takes {option!r} only as --NAME or --NAME=VALUE"
            )
        parameters[name] = value if equals else True
    signal = f"USR1@{WARNING_S}" if stage.kind == "torchrun" else None
    # The batch script is NeMo-Run's and dies of a signal; the tasks get it directly.
    signal = str(parameters.pop("signal", signal or "")).removeprefix("B:") or None
    return nemo_run.SlurmExecutor(
        account=launch.account or "none",
        partition=launch.partition or None,
        nodes=resources.nodes,
        ntasks_per_node=1,
        gpus_per_node=resources.gpus_per_node or None,
        time=resources.time,
        signal=signal,
        container_image=launch.container_image or None,
        container_mounts=[f"{checkout}:{checkout}", *launch.container_mounts],
        srun_args=["--cpu-bind=none", "--export=ALL"],
        additional_parameters=parameters,
        setup_lines=_setup_lines(stage, checkout),
        tunnel=tunnel,
        packager=nemo_run.Packager(),  # the checkout is on a file system that all nodes share
        poll_estimated_start_time=False,
    )


def _setup_lines(stage: Stage, checkout: str) -> str:
    """The batch script's part before the command: what a file of slurm/ does, and a judge for its srun."""
    lines = ["set +vx", "set -eo pipefail", f"cd {shlex.quote(checkout)}"]
    lines += [f"export {name}={value}" for name, value in sbatch.variables(stage).items()]
    lines += ["source slurm/env.sh", "source slurm/job.sh"]
    if stage.kind == "torchrun":
        lines.append(f"logs=$(log_folder {stage.name})")
        lines += [f"{check} || finish $?" for check in ("rendezvous", 'check_nodes "$logs"', "rendezvous")]
    else:
        lines.append('mkdir -p "$LOPD_LOGS"')
    return "\n".join([*lines, JUDGED_SRUN, "set +eo pipefail"])


def main() -> None:
    """NeMo-Run's command line, with a factory for every recipe of recipes/*.py: `--factory FILE_FUNCTION`."""
    os.environ.setdefault("NEMORUN_HOME", os.path.abspath("runs/nemorun"))  # the scripts go to the run itself
    import nemo_run

    from lopd_megatron import cli

    def launch(recipe: str, where: str = "local", stages: str = "", overrides: str = "") -> None:
        """One recipe's chain on executor `where`; `overrides` is one text: "train.train_iters=3 name=x"."""
        only = [name for name in stages.split(",") if name]
        run_program(lambda: run(chain([recipe], shlex.split(overrides), only), where))

    def partial(recipe: str) -> Callable[[], Any]:
        return lambda: nemo_run.Partial(launch, recipe=recipe)

    for file in sorted(cli.RECIPES.glob("*.py")):
        for function in cli.recipe_names(cli.recipe_module(file)):
            factory = nemo_run.cli.factory(target=launch, name=f"{file.stem}_{function}")
            factory(partial(f"recipes/{file.name}:{function}"))
    nemo_run.cli.main(launch)
    if "--yes" in sys.argv:  # a launch would have exited: this is an error that NeMo-Run has only printed
        sys.exit(1)


if __name__ == "__main__":
    main()
