"""The benchmark's other side does real work: what the imitated official loader delivers is the dataset."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lopd_megatron.data.store import open_dataset

TOOLS = Path(__file__).resolve().parents[3] / "tools" / "bench"


def test_the_imitated_official_loader_delivers_every_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))
    import bench_data
    import bench_data_official as official

    bench_data.make_dataset(tmp_path / "train", 8)
    bench_data.make_parquet(tmp_path / "train", tmp_path / "lists.parquet", 8)
    dataset = open_dataset([tmp_path / "train"])
    table = official.load_official(tmp_path / "lists.parquet")
    tokenizer = official.word_tokenizer(bench_data.VOCAB)
    # A step changes copies only: the second sees the table as the first did.
    for _ in range(2):
        fields = official.official_rank(official.official_rollout(table, tokenizer))
        for index in range(8):
            columns = dataset.document(index)
            response = columns["tokens"][bench_data.PROMPT :]
            assert fields["response_lengths"][index] == len(response)
            assert np.array_equal(fields["tokens"][index], columns["tokens"])
            for name, column in (
                ("loss_masks", "loss_mask"),
                ("teacher_log_probs", "teacher_logprobs"),
                ("rollout_log_probs", "rollout_logprobs"),
            ):
                assert np.array_equal(fields[name][index], columns[column][bench_data.PROMPT :])
    lengths = [len(tokens) for tokens in fields["tokens"]]
    rows = official.official_rows(lengths, 5_000)
    assert sorted(place for row in rows for place in row) == list(range(8))
    totals = [sum(lengths[place] for place in row) for row in rows]
    assert max(totals) - min(totals) <= max(lengths)
    for row in rows:
        tokens, mask = official.official_row(fields, row)
        assert sum(lengths[place] for place in row) <= 5_000
        assert tokens.shape == mask.shape
        assert len(tokens) % 128 == 0
        # The mask is aligned with labels: position t stands for token t + 1.
        trained = torch.cat([fields["tokens"][place][bench_data.PROMPT :] for place in row])
        assert torch.equal(tokens[1:][mask[:-1].bool()], trained)
    masked = [dataset.document(index)["rollout_logprobs"][bench_data.PROMPT :].mean() for index in range(8)]
    teacher = [dataset.document(index)["teacher_logprobs"][bench_data.PROMPT :] for index in range(8)]
    means = official.official_means(fields)
    assert means == pytest.approx([np.mean(masked), np.concatenate(teacher).mean()], rel=1e-5)
