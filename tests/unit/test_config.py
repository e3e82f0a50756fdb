"""Strict configuration: precedence, types, and errors that name the value and the closest valid name."""

from pathlib import Path

import pytest

from lopd_megatron import cli
from lopd_megatron.config import RunConfig
from lopd_megatron.errors import UserError

RECIPE = "recipes/tiny.py:lightning_opd"


def parse(*argv: str) -> RunConfig:
    return cli.parse(cli.parser(None), ["--recipe", RECIPE, *argv])[0]


@pytest.mark.parametrize(
    ("argv", "key", "value"),
    [
        (["optimizer.lr=1e-3"], "optimizer.lr", 1e-3),
        (["--train-iters", "3"], "train.train_iters", 3),
        (["--train-iters=3"], "train.train_iters", 3),
        (["loss.advantage_clip=null"], "loss.advantage_clip", None),
        (["prompts.input=[a.jsonl, b.jsonl]"], "prompts.input", ["a.jsonl", "b.jsonl"]),
        (["model.student=123"], "model.student", "123"),
        (["parallel.sequence_parallel=true"], "parallel.sequence_parallel", True),
        (["train.train_iters=3", "train.train_iters=4"], "train.train_iters", 4),
    ],
)
def test_override(argv: list[str], key: str, value: object) -> None:
    assert parse(*argv).leaves()[key] == value


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["optimizer.lrr=1"], "did you mean 'optimizer.lr'"),
        (["optimiser.lr=1"], "did you mean 'optimizer.lr'"),
        (["--train-iter", "1"], "did you mean '--train-iters'"),
        (["--train-iters"], "needs a value"),
        (["train.train_iters=many"], "train.train_iters=many"),
        (["train.train_iters=0"], "greater than or equal to 1"),
        (["loss.objective=opd"], "lightning_opd"),
        (["loss"], "section.key=value"),
        (["loss=1"], "is a section"),
        (["loss.objective=topk_jsd"], "loss.topk"),
        (["loss.topk=4"], "scores.topk"),
        (["data.seq_length=16"], "does not fit a packed row"),
        (["rollouts.engine.max_model_len=20"], "rollouts.engine.max_model_len=20"),
    ],
)
def test_a_bad_value_is_named(argv: list[str], message: str) -> None:
    with pytest.raises(UserError, match=None) as error:
        parse(*argv)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("recipes/tiny.py", "names no function; recipes/tiny.py has teacher, base, sft"),
        ("recipes/tinny.py:sft", "did you mean 'tiny.py'"),
        ("recipes/tiny.py:lightning", "did you mean 'lightning_opd'"),
    ],
)
def test_an_unknown_recipe_is_named(spec: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        cli.load_recipe(spec)
    assert message in str(error.value)


def test_world_size_must_be_a_multiple() -> None:
    config = parse()
    assert config.parallel.data_parallel_size(8) == 2
    with pytest.raises(UserError, match="world size 6 is not a multiple"):
        config.parallel.data_parallel_size(6)


def test_resolved_config_reads_back(tmp_path: Path) -> None:
    config = parse("optimizer.lr=1e-3", "loss.advantage_clip=null")
    config.dump(tmp_path / "config.json")
    assert RunConfig.read(tmp_path / "config.json") == config


def test_recipes_do_not_share_state() -> None:
    first = parse("rollouts.engine.max_num_seqs=7")
    assert parse().rollouts.engine.max_num_seqs != first.rollouts.engine.max_num_seqs
