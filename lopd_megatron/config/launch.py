"""Sections of launching: what each stage asks for, and where it runs."""

from __future__ import annotations

from pydantic import Field

from lopd_megatron.config.section import Section


class StageResources(Section):
    """What one stage asks for."""

    nodes: int = Field(default=1, ge=1)
    """Nodes; only training takes more than one."""
    gpus_per_node: int = Field(default=0, ge=0)
    """0: CPU only, and training starts TP·PP·CP processes, shared out over the nodes."""
    time: str = Field(default="04:00:00", pattern=r"^(\d+-)?\d{1,2}:\d\d:\d\d$")
    """Slurm's limit of one attempt, [days-]hours:minutes:seconds."""
    array: int = Field(default=1, ge=1)
    """Independent workers of a sharded stage (a Slurm job array)."""


class StagesConfig(Section):
    """What each stage asks for."""

    prompts: StageResources = StageResources()
    rollouts: StageResources = StageResources()
    scores: StageResources = StageResources()
    dataset: StageResources = StageResources()
    train: StageResources = StageResources()
    export: StageResources = StageResources()
    evaluate: StageResources = StageResources()


class LaunchConfig(Section):
    """Where and how the stages run; see docs/cluster.md."""

    account: str = ""
    """Slurm's account; empty: the user's default."""
    partition: str = ""
    """Slurm's partition; empty: the cluster's default."""
    sbatch_options: list[str] = []
    """Further options of sbatch, as they are: `--exclusive`, `--mem=0`, `--qos=high`."""
    container_image: str = ""
    """Pyxis/Enroot image; empty: the virtual environment of slurm/env.sh."""
    container_mounts: list[str] = []
    """SOURCE:TARGET beside the checkout, which is always mounted."""
    max_restarts: int = Field(default=8, ge=0)
    """Requeues of one job in all: time limits, preemption and failures."""
    max_retries: int = Field(default=1, ge=0)
    """Requeues of one job because its command failed."""
    ssh_host: str = ""
    """NeMo-Run: USER@HOST of the login node; empty: submit from this machine."""
    ssh_checkout: str = ""
    """NeMo-Run: this checkout's path on the cluster behind `ssh_host`."""
    stages: StagesConfig = StagesConfig()
