"""Ensembles of scores: hand-worked means, files that say what they hold, folds that are diagonal blocks."""

import numpy as np
import pytest
import torch

import hf_vlp.evaluation.ensemble as ensemble_module
from hf_vlp.evaluation.ensemble import SavedScores, check_fingerprint, mean_scores, write_scores
from hf_vlp.evaluation.retrieval import five_fold_scores, retrieval_metrics, score_metrics

IDS = torch.arange(2)


def test_two_models_right_together_where_each_is_wrong():
    one = torch.tensor([[0.9, 0.1], [0.6, 0.5]])  # the second image finds the first caption
    other = torch.tensor([[0.2, 0.4], [0.1, 0.6]])  # the first image finds the second caption
    mean = mean_scores([one, other])
    assert torch.allclose(mean, torch.tensor([[0.55, 0.25], [0.35, 0.55]]))
    recalls = [score_metrics(scores, IDS, IDS)["image_to_text/R@1"] for scores in (one, other, mean)]
    assert recalls == [50.0, 50.0, 100.0]
    assert torch.equal(mean_scores([one, one, one]), one) and not torch.equal(mean_scores([one, other]), one)


@pytest.mark.parametrize("block", [1, 40, 1 << 22])
def test_the_mean_does_not_depend_on_blocks_order_and_kind(tmp_path, monkeypatch, block):
    monkeypatch.setattr(ensemble_module, "BLOCK_ELEMENTS", block)
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(3, 7, 14, generator=generator)
    owners = torch.arange(14) // 2
    saved = SavedScores(write_scores(tmp_path / "a.safetensors", scores[1], owners, "same"))
    assert saved.shape == (7, 14) and saved.fingerprint == "same" and torch.equal(saved.text_ids, owners)
    assert torch.equal(saved[2:5], scores[1][2:5])
    np.save(tmp_path / "b.npy", scores[2].numpy())
    mapped = np.load(tmp_path / "b.npy", mmap_mode="r")
    expected = scores.double().mean(dim=0).float()
    assert torch.equal(mean_scores([scores[0], saved, mapped]), expected)
    assert torch.equal(mean_scores([mapped, scores[0], saved]), expected)
    assert not torch.equal(mean_scores([mapped, scores[0]]), expected)


def test_scores_of_other_captions_are_refused(tmp_path):
    scores, owners = torch.eye(2), torch.arange(2)
    ours = SavedScores(write_scores(tmp_path / "ours.safetensors", scores, owners, "1"))
    theirs = SavedScores(write_scores(tmp_path / "theirs.safetensors", scores, owners, "2"))
    with pytest.raises(ValueError, match="theirs.safetensors holds scores of other captions.* than ours.safetensors"):
        mean_scores([ours, theirs])
    with pytest.raises(ValueError, match="theirs.safetensors"):
        check_fingerprint(theirs, "1", "--data")
    check_fingerprint(ours, "1", "--data")
    with pytest.raises(ValueError, match=r"shapes \[\(2, 2\), \(2, 3\)\]"):
        mean_scores([ours, torch.zeros(2, 3)])
    with pytest.raises(ValueError, match="no scores"):
        mean_scores([])


def test_bad_files_are_named(tmp_path):
    scores, owners = torch.eye(2), torch.arange(2)
    with pytest.raises(ValueError, match="a.npy must end in .safetensors"):
        write_scores(tmp_path / "a.npy", scores, owners, "1")
    with pytest.raises(ValueError, match=r"\(2, 2\) and text_ids \(3,\)"):
        write_scores(tmp_path / "a.safetensors", scores, torch.arange(3), "1")
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match="no file of scores"):
        SavedScores(tmp_path / "a.safetensors")
    path = write_scores(tmp_path / "a.safetensors", scores, owners, "1")
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="a.safetensors is no file of scores, or a damaged one"):
        SavedScores(path)


def test_folds_of_scores_are_diagonal_blocks():
    generator = torch.Generator().manual_seed(1)
    scores, ids, owners = torch.randn(10, 30, generator=generator), torch.arange(10), torch.arange(30) // 3
    result = five_fold_scores(scores, ids, owners)
    blocks = [scores[2 * k : 2 * k + 2, 6 * k : 6 * k + 6] for k in range(5)]
    parts = [score_metrics(block, ids[:2], owners[:6]) for block in blocks]
    assert result == pytest.approx({name: sum(part[name] for part in parts) / 5 for name in parts[0]})
    assert result["rsum"] > score_metrics(scores, ids, owners)["rsum"]
    with pytest.raises(ValueError, match="10 images do not divide into 4 folds"):
        five_fold_scores(scores, ids, owners, folds=4)


def test_scores_and_features_give_the_same_numbers():
    generator = torch.Generator().manual_seed(2)
    x, y = (torch.randint(-3, 4, (rows, 6), generator=generator).float() for rows in (8, 24))
    ids, owners = torch.arange(8), torch.arange(24) // 3
    assert score_metrics(x @ y.T, ids, owners) == retrieval_metrics(x, y, ids, owners)
    assert score_metrics(-x @ y.T, ids, owners) != retrieval_metrics(x, y, ids, owners)


def test_one_caption_an_image_is_a_square_with_the_positives_on_its_diagonal():
    scores = torch.tensor([[0.9, 0.95, 0.3, 0.2], [0.1, 0.2, 0.4, 0.8]])  # two captions an image
    one = scores[:, ::2]
    assert score_metrics(one, IDS, IDS)["rsum"] == 600.0
    assert score_metrics(scores[:, 1::2], IDS, IDS)["text_to_image/mean_rank"] == 1.0
    swapped = one.flip(1)
    assert score_metrics(swapped, IDS, IDS)["image_to_text/R@1"] == 0.0
