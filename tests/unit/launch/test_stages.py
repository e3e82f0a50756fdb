from __future__ import annotations

import itertools
import shlex
from pathlib import Path

import pytest

from lopd_megatron.config import RunConfig
from lopd_megatron.errors import UserError
from lopd_megatron.launch import sbatch, shell
from lopd_megatron.launch.stages import Stage, chain, stages


def run_config(**sections: object) -> RunConfig:
    config = RunConfig(name="r", run_dir="runs/r")
    config.model.student, config.model.teacher = "student", "teacher"
    config.prompts.input = ["prompts.jsonl"]
    config.evaluation.input = ["problems.jsonl"]
    return config


def names(found: list[Stage]) -> list[str]:
    return [stage.name for stage in found]


def test_all_stages_in_order_each_after_the_writer_of_its_input() -> None:
    found = stages(run_config(), "r.py:f", ["train.train_iters=3"])
    assert names(found) == ["prompts", "rollouts", "scores", "dataset", "train", "export", "evaluate"]
    for before, stage in itertools.pairwise(found):
        assert stage.after == (before.job,)
    assert shlex.join(found[0].command) == ("python -m lopd_megatron prompts r.py:f train.train_iters=3")
    assert shlex.join(found[4].command) == (
        "python -m lopd_megatron.launch.torchrun --standalone --nproc-per-node 1 "
        "-m lopd_megatron.train r.py:f train.train_iters=3"
    )
    assert shlex.join(found[5].command) == ("python -m lopd_megatron export r.py:f train.train_iters=3")


def test_stages_that_the_config_makes_empty_are_left_out() -> None:
    config = run_config()
    config.loss.objective = "sft"
    assert "scores" not in names(stages(config, "r"))
    config.prompts.input = []
    config.evaluation.input = []
    assert names(stages(config, "r")) == ["rollouts", "dataset", "train", "export"]
    config.data.prefixes = ["elsewhere/train"]
    assert names(stages(config, "r")) == ["train", "export"]


def test_standard_opd_trains_right_after_its_prompts() -> None:
    config = run_config()
    config.online.enabled = True
    found = stages(config, "r.py:f")
    assert names(found) == ["prompts", "train", "export", "evaluate"]
    assert found[1].command == ("python", "-m", "lopd_megatron", "train", "r.py:f")
    assert found[1].after == ("r-prompts",)
    config.online.student_url = config.online.teacher_url = "http://host:1"  # servers that run elsewhere
    assert "lopd_megatron.train" in stages(config, "r.py:f")[1].command


def test_two_runs_chain_through_their_files() -> None:
    found = {stage.job: stage for stage in chain(["recipes/tiny.py:sft", "recipes/tiny.py:lightning_opd"])}
    assert found["lightning_opd-rollouts"].after == ("lightning_opd-prompts", "sft-export")
    assert "sft-export" in found["lightning_opd-train"].after
    assert found["sft-prompts"].after == ()


def test_only_some_stages() -> None:
    found = chain(["recipes/tiny.py:lightning_opd"], only=["train", "export"])
    assert [(stage.name, stage.after) for stage in found] == [
        ("train", ()),
        ("export", ("lightning_opd-train",)),
    ]
    with pytest.raises(UserError, match="no stage 'trian'; it has prompts"):
        chain(["recipes/tiny.py:lightning_opd"], only=["trian"])


def test_one_name_for_two_runs_is_refused() -> None:
    with pytest.raises(UserError, match="two runs"):
        chain(["recipes/tiny.py:sft", "recipes/tiny.py:lightning_opd"], ["name=same"])


@pytest.mark.parametrize(
    ("nodes", "gpus", "layout", "expected"),
    [
        pytest.param(1, 0, (2, 2), "--standalone --nproc-per-node 4", id="cpu: one process per rank"),
        pytest.param(2, 0, (2, 2), "--nnodes 2 --nproc-per-node 2", id="cpu: shared out over nodes"),
        pytest.param(8, 8, (4, 2), "--nnodes 8 --nproc-per-node 8", id="64 GPUs"),
    ],
)
def test_world_size(nodes: int, gpus: int, layout: tuple[int, int], expected: str) -> None:
    config = run_config()
    config.launch.stages.train.nodes = nodes
    config.launch.stages.train.gpus_per_node = gpus
    config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size = layout
    (train,) = (stage for stage in stages(config, "r") if stage.name == "train")
    assert expected in shlex.join(train.command)


def test_what_cannot_run_is_refused_before_anything_is_submitted() -> None:
    config = run_config()
    config.parallel.tensor_model_parallel_size = 8
    config.launch.stages.train.gpus_per_node = 4
    with pytest.raises(UserError, match="world size 4 is not a multiple"):
        stages(config, "r")
    config.launch.stages.train.gpus_per_node = 0
    config.launch.stages.train.nodes = 3
    with pytest.raises(UserError, match=r"train.nodes=3 does not divide"):
        stages(config, "r")
    config.launch.stages.train.nodes = 1
    config.launch.stages.dataset.array = 2
    with pytest.raises(UserError, match=r"dataset.array=2"):
        stages(config, "r")


def test_a_training_job_outlives_its_warning() -> None:
    config = run_config()
    config.launch.stages.train.time = "00:05:00"
    with pytest.raises(UserError, match=r"train.time=00:05:00: training is told to save 300 s before"):
        sbatch.render(stages(config, "r"))
    config.launch.sbatch_options = ["--signal=B:USR1@30"]
    assert "--time=00:05:00" in sbatch.render(stages(config, "r"))


def test_array_workers() -> None:
    config = run_config()
    config.launch.stages.rollouts.array = 2
    rollouts = stages(config, "r")[1]
    assert [command[-2:] for command in rollouts.worker_commands()] == [
        ("--worker", "0/2"),
        ("--worker", "1/2"),
    ]


def test_a_shell_has_one_node() -> None:
    config = run_config()
    config.launch.stages.train.nodes = 2
    config.parallel.tensor_model_parallel_size = 2
    with pytest.raises(UserError, match="a shell has one"):
        shell.run(stages(config, "r"))


@pytest.mark.processes
def test_shell_stops_at_the_first_failure_and_repeats_early_stops(tmp_path: Path) -> None:
    done = tmp_path / "done"
    twice = f"echo x >> {done}; [ $(wc -l < {done}) -ge 3 ] || exit 85"

    def stage(name: str, text: str) -> Stage:
        config = run_config()
        return Stage("r", name, "plain", ("bash", "-c", text), config.launch.stages.train, (), (), config)

    assert shell.run([stage("a", twice), stage("b", "exit 4"), stage("c", f"rm {done}")]) == 4
    assert done.read_text().split() == ["x"] * 3


def test_secrets_do_not_travel_on_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "hush")
    assert "hush" not in sbatch.render(stages(run_config(), "r"))


def test_a_refresh_round_waits_for_the_export_of_the_one_before() -> None:
    rounds = ["recipes/tiny.py:lightning_opd_round_1", "recipes/tiny.py:lightning_opd_round_2"]
    found = {stage.job: stage for stage in chain(rounds)}
    assert "lightning_opd_round_1-export" in found["lightning_opd-rollouts"].after
    assert "lightning_opd_round_1-export" in found["lightning_opd-train"].after
