"""The import rules of the design: one direction, and every heavy or optional package in one file."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "files", "imports", "progress", "records", "plugins", "config", "cli"),
    ("hf_folder",),
    ("fingerprints", "lineage", "refresh", "settings_reference", "layout_check"),
    ("loss", "parallel"),
    ("data", "model"),
    ("inference", "train", "analysis", "launch"),
    ("rollouts", "effopd"),
    ("online", "evaluation", "report"),
    ("study",),
    ("recipes",),
    ("commands",),
    ("__main__",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
"""A folder imports from lower levels. Folders of one level import each other unless they are stages."""

STAGES = {"inference", "train", "analysis", "launch", "rollouts", "effopd", "online", "evaluation", "report"}

ONLY_IN = {
    "vllm": {"lopd_megatron/inference/engine.py"},
    "nemo_run": {"lopd_megatron/launch/nemo_run.py"},
    "wandb": {"lopd_megatron/train/wandb_log.py"},
    "transformer_engine": {"lopd_megatron/model/transformer_engine.py"},
    "megatron.core.parallel_state": {"lopd_megatron/parallel/topology.py"},
}


def imports(path: Path) -> list[tuple[str, bool]]:
    """(module, imported at the top of the file) of each import in a file."""
    tree = ast.parse(path.read_text())
    top = set(map(id, tree.body))
    for node in tree.body:  # `if TYPE_CHECKING:` and try blocks count as the top
        top |= {id(child) for child in ast.walk(node) if isinstance(node, ast.If | ast.Try)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append((node.module, id(node) in top))
            found += [(f"{node.module}.{alias.name}", id(node) in top) for alias in node.names]
    return found


def violations(path: Path, root: Path) -> list[str]:
    """The import rules that a file breaks."""
    relative = path.relative_to(root).as_posix()
    parts = Path(relative).with_suffix("").parts
    broken = []
    if parts[0] == "lopd_megatron":
        # A program is the top of the house, whatever room it starts: it may use all of them.
        own = "__main__" if parts[-1] == "__main__" else parts[1]
        for module, _ in imports(path):
            names = module.split(".")
            if names[0] in ("tools", "recipes", "tests"):
                broken.append(f"{relative} imports {module}")
            if names[0] != "lopd_megatron" or len(names) < 2 or names[1] not in LEVEL or names[1] == own:
                continue
            same_level = LEVEL[names[1]] == LEVEL[own]
            if LEVEL[names[1]] > LEVEL[own] or (same_level and {own, names[1]} <= STAGES):
                broken.append(f"{relative} imports {module}")
    for module, at_top in imports(path):
        for package, files in ONLY_IN.items():
            if module == package or module.startswith(package + "."):
                if relative not in files:
                    broken.append(f"{relative} imports {package}")
                elif at_top and not package.startswith("megatron"):
                    broken.append(f"{relative} imports {package} outside a function")
    return sorted(set(broken))


def sources() -> list[Path]:
    return sorted(
        p for folder in ("lopd_megatron", "tools", "recipes") for p in (ROOT / folder).rglob("*.py")
    )


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_import_rules(path: Path) -> None:
    assert violations(path, ROOT) == []


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("lopd_megatron/loss/bad.py", "from lopd_megatron.train import step"),
        ("lopd_megatron/train/bad.py", "from lopd_megatron.inference import engine"),
        ("lopd_megatron/data/bad.py", "import vllm"),
        ("lopd_megatron/inference/engine.py", "import vllm"),
        ("lopd_megatron/train/bad2.py", "from megatron.core import parallel_state"),
        ("lopd_megatron/model/bad.py", "from lopd_megatron.recipes import tiny"),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, name: str, code: str) -> None:
    file = tmp_path / name
    file.parent.mkdir(parents=True)
    file.write_text(code + "\n")
    assert violations(file, tmp_path)
