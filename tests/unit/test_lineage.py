"""Fingerprints are of content, and the three rules of one teacher, one student, one vocabulary hold."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lopd_megatron import fingerprints
from lopd_megatron.errors import UserError
from lopd_megatron.fingerprints import model_fingerprint, tokenizer_fingerprint
from lopd_megatron.lineage import Lineage, check_consistency, read_model_lineage
from tests.helpers.models import write_model_lineage
from tests.unit.data.samples import save_model, save_vocabulary


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_model(tmp_path / "model")


def fingerprint(folder: Path) -> str:
    return model_fingerprint(folder)["fingerprint"]


def test_the_place_does_not_count_and_the_content_does(model: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    assert fingerprint(copy) == fingerprint(model)
    assert model_fingerprint(copy)["origin"] == str(copy)
    path = copy / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert fingerprint(copy) != fingerprint(model)


def test_another_split_into_files_is_the_same_model(model: Path, tmp_path: Path) -> None:
    """An export may shard differently than the folder it came from."""
    other = Path(shutil.copytree(model, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    (other / "model.safetensors").unlink()
    for index, name in enumerate(sorted(tensors, reverse=True)):
        save_file({name: tensors[name]}, str(other / f"model-{index}.safetensors"), metadata={"format": "pt"})
    files = {name: f"model-{index}.safetensors" for index, name in enumerate(sorted(tensors, reverse=True))}
    (other / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    assert fingerprint(other) == fingerprint(model)


@pytest.mark.parametrize("change", ["rename", "dtype", "shape", "config", "drop"])
def test_every_part_counts(model: Path, change: str) -> None:
    before = fingerprint(model)
    tensors = load_file(model / "model.safetensors")
    if change == "rename":
        tensors = {"a.weight": tensors["a.weight"], "c.weight": tensors["b.weight"]}
    elif change == "dtype":
        tensors["a.weight"] = tensors["a.weight"].view(np.int32)
    elif change == "shape":
        tensors["a.weight"] = tensors["a.weight"].reshape(4, 3)
    elif change == "drop":
        del tensors["a.weight"]
    else:
        (model / "config.json").write_text(json.dumps({"model_type": "qwen3", "hidden_size": 8}))
    save_file(tensors, str(model / "model.safetensors"))
    assert fingerprint(model) != before


def test_what_save_pretrained_rewrites_does_not_count(model: Path) -> None:
    before = fingerprint(model)
    config = {"transformers_version": "9", "hidden_size": 4, "model_type": "qwen3", "_name_or_path": "x"}
    (model / "config.json").write_text(json.dumps(config))
    assert fingerprint(model) == before


def test_bytes_are_read_once(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint(model)
    with monkeypatch.context() as patch:
        patch.setattr(fingerprints, "_hash_safetensors", None)  # a second read would raise
        assert fingerprint(model) == before
    (model / "model.safetensors").touch()  # another modification time: read again, same content
    assert fingerprint(model) == before
    assert [path.name for path in model.iterdir() if path.name.startswith(".")] == []


def test_a_cache_that_cannot_be_written_costs_only_time(
    model: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache.write_text("a file where the folder should be")
    assert fingerprint(model)
    assert "computed again next time" in capsys.readouterr().err


def test_a_folder_without_a_model(tmp_path: Path, model: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json does not exist"):
        model_fingerprint(tmp_path / "nothing")
    (model / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors does not exist"):
        model_fingerprint(model)


def test_a_truncated_download(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match="is no whole safetensors file"):
        model_fingerprint(model)


def test_tokenizers_agree_by_vocabulary(model: Path, tmp_path: Path) -> None:
    """A chat template may change in SFT; the map from token to id may not."""
    other = Path(shutil.copytree(model, tmp_path / "other"))
    (other / "chat_template.jinja").write_text("another template")
    first, second = tokenizer_fingerprint(model), tokenizer_fingerprint(other)
    assert first["vocabulary"] == second["vocabulary"]
    assert first["fingerprint"] != second["fingerprint"]
    save_vocabulary(other, ("<pad>", "b", "a", "c"))
    assert tokenizer_fingerprint(other)["vocabulary"] != first["vocabulary"]


def test_lineage_travels_with_a_model(model: Path, tmp_path: Path) -> None:
    assert read_model_lineage(model) == Lineage()
    known = Lineage(sft_teacher=model_fingerprint(model), parents=["a"])
    write_model_lineage(model, known)
    assert read_model_lineage(model) == known
    (model / "lineage.json").write_text('{"sft_teachr": null}')
    with pytest.raises(UserError, match=r"lineage\.json: lineage field sft_teachr"):
        read_model_lineage(model)


class Family:
    """A teacher, the student it wrote SFT data for, and rollouts of that student scored by that teacher."""

    def __init__(self, folder: Path) -> None:
        self.teacher = save_model(folder / "teacher", seed=1)
        self.other_teacher = save_model(folder / "other_teacher", seed=2)
        self.student = save_model(folder / "student", seed=3)
        self.other_student = save_model(folder / "other_student", seed=4)
        write_model_lineage(self.student, Lineage(sft_teacher=model_fingerprint(self.teacher)))
        self.scored = Lineage(
            generator=model_fingerprint(self.student),
            teacher=model_fingerprint(self.teacher),
            tokenizer=tokenizer_fingerprint(self.student),
        )


@pytest.fixture
def family(tmp_path: Path) -> Family:
    return Family(tmp_path)


def test_a_consistent_family_passes(family: Family) -> None:
    assert check_consistency(student=family.student, teacher=family.teacher, data=family.scored) == ""
    assert check_consistency(student=family.student, teacher=family.teacher) == ""


def test_training_needs_no_teacher_at_hand(family: Family) -> None:
    assert check_consistency(student=family.student, teacher="not/on/this/cluster", data=family.scored) == ""


def refused(**arguments: object) -> str:
    with pytest.raises(UserError) as caught:
        check_consistency(**arguments)
    return str(caught.value)


def test_another_teacher_than_of_the_sft_data(family: Family) -> None:
    message = refused(student=family.student, teacher=family.other_teacher, data_origin="rollouts")
    assert message.startswith("rollouts: the scoring teacher is")
    for folder in (family.teacher, family.other_teacher):
        assert str(folder) in message
        assert model_fingerprint(folder)["fingerprint"][:16] in message
    assert "lineage.allow_mismatch=REASON" in message


def test_scores_of_another_teacher(family: Family) -> None:
    scored = family.scored.model_copy(update={"teacher": model_fingerprint(family.other_teacher)})
    message = refused(student=family.student, teacher=family.teacher, data=scored)
    assert "the rollouts were scored by" in message
    assert "the SFT data was written by" in message


def test_rollouts_of_another_student(family: Family) -> None:
    message = refused(student=family.other_student, teacher=family.teacher, data=family.scored)
    assert f"the rollouts were sampled by {family.student}" in message
    assert f"training starts from {family.other_student}" in message


def test_another_vocabulary(family: Family) -> None:
    save_vocabulary(family.teacher, ("<pad>", "a", "b", "d"))
    assert "tokenizer" in refused(student=family.student, teacher=family.teacher, data=family.scored)


def test_sft_data_of_another_teacher(family: Family) -> None:
    written = Lineage(generator=model_fingerprint(family.teacher))
    arguments = {"student": family.student, "data": written, "needs_teacher": False}
    assert check_consistency(teacher=family.teacher, **arguments) == ""
    assert "the SFT data was written by" in refused(teacher=family.other_teacher, **arguments)


def test_the_override_is_returned_to_be_recorded(family: Family, capsys: pytest.CaptureFixture[str]) -> None:
    reason = check_consistency(
        student=family.other_student, data=family.scored, allow_mismatch="ablation of the teacher"
    )
    assert reason == "ablation of the teacher"
    assert "allowed: ablation of the teacher" in capsys.readouterr().err
    parent = family.scored.model_copy(update={"allow_mismatch": "earlier"})
    assert check_consistency(student=family.student, data=parent) == "earlier"


def test_the_override_is_empty_where_no_rule_is_broken(family: Family) -> None:
    assert check_consistency(student=family.student, data=family.scored, allow_mismatch="just in case") == ""


def test_same_content_forgets_places(family: Family, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(family.student, tmp_path / "moved"))
    here, there = (Lineage(generator=model_fingerprint(folder)) for folder in (family.student, moved))
    assert here != there
    assert here.same_content(there)
