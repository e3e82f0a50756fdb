"""Recipes from the command line: arguments, shipped files, files of the user, and what can be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lopd_megatron import cli
from lopd_megatron.__main__ import main
from lopd_megatron.config import RunConfig
from lopd_megatron.errors import UserError
from lopd_megatron.recipes import qwen3_32b

HEAD = "from lopd_megatron.config import RunConfig\n"


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    return tmp_path


@pytest.mark.parametrize(
    "spec",
    [
        "recipes/qwen3_32b.py:lightning_opd(gpus=64)",
        "qwen3_32b.py:lightning_opd( gpus = 64 )",
        "qwen3_32b:lightning_opd(gpus=64)",
    ],
)
def test_a_shipped_recipe_is_found_from_anywhere(elsewhere: Path, spec: str) -> None:
    assert cli.load_recipe(spec) == qwen3_32b.lightning_opd(64)
    assert list(elsewhere.iterdir()) == []


def test_a_file_here_comes_before_a_shipped_one(elsewhere: Path) -> None:
    (elsewhere / "recipes").mkdir()
    (elsewhere / "recipes" / "tiny.py").write_text(
        HEAD + "def sft() -> RunConfig:\n    return RunConfig(name='own')\n"
    )
    assert cli.load_recipe("recipes/tiny.py:sft").name == "own"


def test_what_lies_beside_a_recipe_can_be_imported(elsewhere: Path) -> None:
    (elsewhere / "beside_it.py").write_text("NAME = 'from beside'\n")
    (elsewhere / "own.py").write_text(
        HEAD + "import beside_it\ndef f() -> RunConfig:\n    return RunConfig(name=beside_it.NAME)\n"
    )
    assert cli.load_recipe(str(elsewhere / "own.py:f")).name == "from beside"
    assert not (elsewhere / "__pycache__").exists()  # a dry run writes nothing


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("recipes/qwen3_32b.py:lightning_opd(gpu=64)", "no argument 'gpu'; lightning_opd takes gpus"),
        ("recipes/qwen3_32b.py:lightning_opd(64)", "write FILE.py:FUNCTION"),
        ("recipes/qwen3_32b.py:lightning_opd(gpus=__import__('os'))", "cannot read recipe"),
        ("recipes/qwen3_32b.py:lightning_opd(gpus=64", "cannot read recipe"),
        ("recipes/qwen3_32b.py:lightning_opd(gpus=63)", "no layout for 63 GPUs"),
        ("recipes/qwen3_32b.py:lightning_opd(gpus='x')", "no layout for x GPUs"),
        ("recipes/qwen3_32b.py", "names no function; recipes/qwen3_32b.py has sft, lightning_opd"),
        ("recipes/qwen3_32b.py:", "names no function"),
        ("recipes/qwen_32b.py:sft", "did you mean 'qwen3_32b.py'"),
        ("nowhere/x.py:sft", "does not exist"),
    ],
)
def test_a_wrong_name_is_one_line(elsewhere: Path, spec: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        cli.load_recipe(spec)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def f(:\n", r"SyntaxError: .* \(line 1\)"),
        ("import no_such_module\n", r"ModuleNotFoundError: .*no_such_module.* \(line 1\)"),
        (HEAD + "x = 1 / 0\n", r"ZeroDivisionError: division by zero \(line 2\)"),
        (
            HEAD + "def f() -> RunConfig:\n    return None\n",
            "returned NoneType; a recipe returns a RunConfig",
        ),
        (HEAD + "def f() -> RunConfig:\n    return [][1]\n", r"failed: IndexError: .* \(line 3\)"),
        (
            HEAD + "def f() -> RunConfig:\n    c = RunConfig()\n    c.train.train_iters = 0\n    return c\n",
            r"failed: ValidationError: .* \(line 4\)",
        ),
        (HEAD + "def g() -> int:\n    return 3\n", "has no recipe 'f'"),
        ("\x00", "cannot be loaded"),
    ],
)
def test_a_broken_file_is_one_line_with_its_place(elsewhere: Path, code: str, message: str) -> None:
    (elsewhere / "own.py").write_text(code)
    with pytest.raises(UserError, match=message) as error:
        cli.load_recipe("own.py:f")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["loss.clip=1"], "loss has objective, advantage_clip"),
        (["train.trani_iters=1"], r"did you mean 'train\.train_iters'\? train has train_iters"),
        (["optimizer.lr=inf"], "finite"),
        (["optimizer.lr=nan"], "finite"),
        (["train.seed=-1"], "greater than or equal to 0"),
        (["rollouts.seed=-1"], "greater than or equal to 0"),
        (["loss=3"], "is a section"),
    ],
)
def test_a_wrong_setting_is_one_line(elsewhere: Path, words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        cli.parse(cli.parser(None), ["tiny:sft", *words])
    assert "\n" not in str(error.value)


def test_one_file_is_a_list_of_one() -> None:
    config, _ = cli.parse(cli.parser(None), ["tiny:sft", "prompts.input=a.jsonl"])
    assert config.prompts.input == ["a.jsonl"]


def test_old_names_work_and_are_reported(capsys: pytest.CaptureFixture[str]) -> None:
    config, _ = cli.parse(
        cli.parser(None),
        ["tiny:sft", "rollout.seed=7", "scoring.topk=3", "launch.stages.build.time=01:00:00"],
    )
    assert (config.rollouts.seed, config.scores.topk) == (7, 3)
    assert config.launch.stages.dataset.time == "01:00:00"
    assert "rollout.* is called rollouts.* now" in capsys.readouterr().err


LAYOUTS = {
    "tensor_model_parallel_size=3": "32 attention heads, 8 KV heads and 12288 MLP columns of the student; "
    "these do: 1, 2, 4, 8, 16, 32",
    "pipeline_model_parallel_size=5": "36 layers of the student; these do: 1, 2, 3, 4, 6, 9, 12, 18, 36",
}


@pytest.mark.parametrize("setting", LAYOUTS)
@pytest.mark.parametrize("verb", [["train"], ["run"], ["run", "--on", "slurm"]])
def test_a_layout_that_cannot_be_is_refused_by_a_dry_run(verb: list[str], setting: str) -> None:
    words = [*verb, "qwen3_8b:sft", "model.student=models/Qwen3-8B-Base", f"parallel.{setting}", "--dry-run"]
    with pytest.raises(UserError) as error:
        main(words)
    assert LAYOUTS[setting] in str(error.value)


def test_nine_heads_cannot_be_halved(tmp_path: Path) -> None:
    sizes = {"num_attention_heads": 9, "num_key_value_heads": 3, "num_hidden_layers": 30}
    (tmp_path / "config.json").write_text(json.dumps(sizes | {"intermediate_size": 24}))
    size = f"model.student={tmp_path}", "parallel.tensor_model_parallel_size=2"
    with pytest.raises(UserError, match=r"=2 does not split 9 attention heads.*; these do: 1, 3$"):
        main(["train", "tiny:sft", *size, "--dry-run"])


def test_run_config_has_no_renamed_section() -> None:
    assert not {"rollout", "scoring"} & set(RunConfig.model_fields)
