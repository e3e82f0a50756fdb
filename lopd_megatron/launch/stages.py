"""The stages of a run as commands with resource requests: the one source of shell, sbatch and NeMo-Run.

    prompts ─► rollouts ─► scores ─► dataset ─► train ─► export ─► evaluate

A stage that the config makes empty is left out: `prompts` without `prompts.input`, `evaluate` without
`evaluation.input`, `scores` for SFT, and everything before `train` when `data.prefixes` names datasets.
Standard OPD has no `rollouts`, `scores` and `dataset`: its `train` does their work at every step.
Order comes from files: a stage runs after the stages that write what it reads, also across runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from lopd_megatron import cli
from lopd_megatron.config import RunConfig, StageResources
from lopd_megatron.errors import UserError
from lopd_megatron.layout_check import check_layout

RENAMED_STAGES = {"score": "scores", "build": "dataset"}
"""Names of 0.1.0, which still work."""
WARNING_S = 300
"""Before its time limit a training job is told to save; Slurm may say so a minute early."""


@dataclass(frozen=True)
class Stage:
    """One program of the pipeline, what it asks for, and the files that tie it to the others."""

    run: str
    name: str
    kind: Literal["plain", "array", "torchrun"]
    command: tuple[str, ...]
    resources: StageResources
    reads: tuple[Path, ...]
    writes: tuple[Path, ...]
    config: RunConfig
    after: tuple[str, ...] = ()
    """Jobs that must have succeeded before."""

    @property
    def job(self) -> str:
        """Name of the job in a queue, unique in a chain: `lightning_opd-train`."""
        return f"{self.run}-{self.name}"

    def worker_commands(self) -> list[tuple[str, ...]]:
        """The command of every worker, in order; one for all stages but arrays of more than one."""
        workers = self.resources.array
        if workers == 1:
            return [self.command]
        return [(*self.command, "--worker", f"{i}/{workers}") for i in range(workers)]


def refuse_short_time(stage: Stage) -> None:
    """Slurm would tell a training job with less time than its warning to save as soon as it has started."""
    launch, time = stage.config.launch, stage.resources.time
    if stage.kind != "torchrun" or any(option.startswith("--signal") for option in launch.sbatch_options):
        return
    days, _, clock = time.rpartition("-")
    hours, minutes, seconds = map(int, clock.split(":"))
    if ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds <= WARNING_S + 60:
        raise UserError(
            f"launch.stages.{stage.name}.time={time}: training is told to save {WARNING_S} s before, or a "
            "minute earlier; give it more, or its own warning: launch.sbatch_options=[--signal=B:USR1@30]"
        )


def processes_per_node(config: RunConfig) -> int:
    """Training processes on each node: one per GPU, or TP·PP·CP over all nodes where there is no GPU.

    Refuses a world size which the layout does not divide, before anything is submitted.
    """
    resources, layout = config.launch.stages.train, config.parallel
    nodes, size = resources.nodes, layout.model_parallel_size
    if not resources.gpus_per_node and size % nodes:
        raise UserError(
            f"launch.stages.train.nodes={nodes} does not divide TP·PP·CP={size}; "
            "on CPU the ranks of one replica are shared out evenly over the nodes"
        )
    processes = resources.gpus_per_node or size // nodes
    layout.data_parallel_size(nodes * processes)
    return processes


def stages(config: RunConfig, recipe: str, overrides: Sequence[str] = ()) -> list[Stage]:
    """The stages of one run, in an order in which they can run."""
    arguments = (recipe, *overrides)
    paths, model, wanted = config.paths, config.model, config.launch.stages
    sft = not config.needs_teacher

    def stage(
        name: str,
        program: Sequence[str],
        reads: Sequence[str | Path],
        writes: Path,
        kind: Literal["plain", "array", "torchrun"] = "plain",
    ) -> Stage:
        resources: StageResources = getattr(wanted, name)
        if kind != "array" and resources.array > 1:
            raise UserError(
                f"launch.stages.{name}.array={resources.array}: only rollouts, scores and evaluate are arrays"
            )
        if kind != "torchrun" and resources.nodes > 1:
            raise UserError(
                f"launch.stages.{name}.nodes={resources.nodes}: this stage runs on one node; "
                "rollouts, scores and evaluate take more workers with array, training with online.enabled "
                "more nodes with online.student_url and online.teacher_url"
            )
        return Stage(
            config.name,
            name,
            kind,
            (*program, *arguments),
            resources,
            tuple(Path(path) for path in reads if str(path)),
            (writes,),
            config,
        )

    found: list[Stage] = []
    online = config.online.enabled
    if config.prompts.input and (online or not config.data.prefixes):
        files = [*config.prompts.input, *config.prompts.contamination_files]
        found.append(stage("prompts", _lopd("prompts"), [model.student, *files], paths.prompts))
    if not config.data.prefixes and not online:
        generator = model.student if config.rollouts.generator == "student" else model.teacher
        program = _lopd("rollouts")
        found.append(stage("rollouts", program, [paths.prompts, generator], paths.rollouts, "array"))
        if not sft:
            program = _lopd("scores")
            found.append(stage("scores", program, [paths.rollouts, model.teacher], paths.scores, "array"))
        source = paths.rollouts if sft else paths.scores
        found.append(stage("dataset", _lopd("dataset"), [source], paths.dataset_prefix))
    data = [paths.prompts, model.teacher] if online else list(config.dataset_prefixes)
    read = [model.student, *data, *config.data.valid_prefixes]
    if online and not (config.online.student_url and config.online.teacher_url):
        # Starts its servers beside the training, on this one node.
        found.append(stage("train", _lopd("train"), read, paths.checkpoints))
    else:
        found.append(stage("train", _torchrun(config), read, paths.checkpoints, "torchrun"))
    found.append(stage("export", _lopd("export"), [paths.checkpoints, model.student], paths.hf))
    if config.evaluation.input:
        inputs: list[str | Path] = [paths.hf, *config.evaluation.input]
        found.append(stage("evaluate", _lopd("evaluate"), inputs, paths.evaluation, "array"))
    return ordered(found)


def chain(recipes: Sequence[str], overrides: Sequence[str] = (), only: Sequence[str] = ()) -> list[Stage]:
    """The stages of several runs as one chain, such as SFT and then OPD from the SFT student.

    `overrides` apply to every run. `only` keeps the stages with these names.
    """
    found: list[Stage] = []
    for recipe in recipes:
        config, _ = cli.parse(cli.parser(None), [recipe, *overrides])
        check_layout(config)
        found += stages(config, recipe, overrides)
    names = list(dict.fromkeys(stage.name for stage in found))
    only = [RENAMED_STAGES.get(name, name) for name in only]
    for name in only:
        if name not in names:
            raise UserError(f"--stages: this chain has no stage {name!r}; it has {', '.join(names)}")
    jobs = [stage.job for stage in found]
    for job in jobs:
        if jobs.count(job) > 1:
            raise UserError(
                f"two runs of the chain are called {job.rpartition('-')[0]!r}; give each its own name"
            )
    return ordered([stage for stage in found if not only or stage.name in only])


def ordered(found: Sequence[Stage]) -> list[Stage]:
    """Fill in `after`: the earlier stages that write what a stage reads."""
    writer: dict[Path, str] = {}
    result = []
    for stage in found:
        after = dict.fromkeys(writer[path] for path in stage.reads if path in writer)
        result.append(replace(stage, after=tuple(after)))
        writer |= dict.fromkeys(stage.writes, stage.job)
    return result


def _lopd(verb: str) -> tuple[str, ...]:
    return ("python", "-m", "lopd_megatron", verb)


def _torchrun(config: RunConfig) -> tuple[str, ...]:
    """torchrun for the trainer. Where the nodes meet is in the environment, never in the command."""
    nodes = config.launch.stages.train.nodes
    where = ("--standalone",) if nodes == 1 else ("--nnodes", str(nodes))
    processes = ("--nproc-per-node", str(processes_per_node(config)))
    launcher = ("python", "-m", "lopd_megatron.launch.torchrun")
    return (*launcher, *where, *processes, "-m", "lopd_megatron.train")
