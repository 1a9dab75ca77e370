"""Retrieval by a model that scores pairs: all of them, some of them, stopped and resumed."""

import pytest
import torch

from hf_vlp.evaluation.encoding import apart, together
from hf_vlp.evaluation.fusion_retrieval import (
    Candidates,
    embeds_each_side,
    evaluate_fusion_retrieval,
    propose,
    two_stage_metrics,
    two_stage_ranks,
)
from hf_vlp.evaluation.pair_scoring import ProgressFile, TokenizedTexts, duration, run_fingerprint
from hf_vlp.evaluation.ranks import ranks_from_scores
from hf_vlp.evaluation.retrieval import RetrievalSet, evaluate_retrieval, score_metrics
from tests.objectives.pair_model import PairModel, PairProcessor, TwoStageModel, pair_records

IMAGES, CAPTIONS = 7, 21


def evaluate(model=None, records=None, **options):
    model = PairModel() if model is None else model
    return evaluate_fusion_retrieval(
        model, PairProcessor(), pair_records() if records is None else records, **{"progress": False, **options}
    )


def brute_force(model: PairModel) -> torch.Tensor:
    """[N, M], one image and one text at a time."""
    model.eval()
    pairs, processor = RetrievalSet(pair_records()), PairProcessor()
    scores = torch.empty(IMAGES, CAPTIONS)
    with torch.no_grad():
        for image in range(IMAGES):
            encoded = model.encode_image(**pairs.inputs(processor, [image]))
            for text, caption in enumerate(pairs.captions):
                scores[image, text] = model.score_pairs(**processor(text=[caption]), **encoded)
    return scores


def ranked(report) -> dict[str, float]:
    """The metrics without those of the first stage."""
    return {name: value for name, value in report.metrics.items() if not name.startswith("first_stage/")}


def first_stage(seed: int = 5) -> torch.Tensor:
    return torch.randn(IMAGES, CAPTIONS, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("batch_size", "pair_batch_size"), [(128, 256), (1, 5), (3, 1), (2, 30)])
def test_every_pair_is_scored_once_and_as_if_alone(batch_size, pair_batch_size):
    model = PairModel().train()
    report = evaluate(model, batch_size=batch_size, pair_batch_size=pair_batch_size)
    assert model.training and model.encoded == IMAGES
    assert len(model.scored) == len(set(model.scored)) == IMAGES * CAPTIONS
    wanted = brute_force(PairModel())
    torch.testing.assert_close(report.scores(), wanted, rtol=0, atol=1e-6)
    assert not torch.allclose(wanted, brute_force(PairModel(seed=1)), atol=1e-2)
    pairs = RetrievalSet(pair_records())
    assert report.metrics == score_metrics(report.scores(), pairs.image_ids, pairs.text_ids)
    assert report.counts["images"] == IMAGES and report.counts["captions"] == CAPTIONS
    assert "every pair scored" in report.protocol and "text to image" in report.table()
    assert set(report.to_dict()) == {"metrics", "counts", "protocol"}
    for (text, own, found), column in zip(report.top(3), report.scores().T):
        assert found == column.topk(3).indices.tolist()
        assert pairs.captions.index(text) in (pairs.text_ids == own).nonzero()[:, 0].tolist()
    with pytest.raises(ValueError, match="5,000 images"):
        report.five_fold_1k()


def test_a_batch_is_as_long_as_its_longest_and_no_longer():
    model = PairModel()
    evaluate(model, pair_batch_size=10)
    lengths = TokenizedTexts(PairProcessor(), RetrievalSet(pair_records()).captions).lengths
    work = sum(count * (words + cells) for count, words, cells in model.shapes)
    least = IMAGES * int(lengths.sum()) + CAPTIONS * sum(1 + number % 3 for number in range(IMAGES))
    most = IMAGES * CAPTIONS * (int(lengths.max()) + 3)
    assert least <= work < least + 0.35 * (most - least)
    assert model.shapes[0][1:] == (int(lengths.max()), 3)  # the longest first


def test_kept_pictures_of_mixed_sizes_score_the_same():
    kept = RetrievalSet(pair_records(), PairProcessor())
    assert [row["pixel_values"].shape[-1] for row in kept.kept] == [1, 2, 3, 1, 2, 3, 1]
    assert torch.equal(evaluate(records=kept).scores(), evaluate().scores())


def test_prompts_reach_the_model():
    assert not torch.equal(evaluate(prompt=lambda text: f"1 {text}").scores(), evaluate().scores())


def test_rows_come_apart_and_together():
    batch = PairProcessor()(images=[0, 1, 2])
    rows = apart(batch)
    assert [row["pixel_values"].shape for row in rows] == [(3, 1, 1), (3, 1, 2), (3, 1, 3)]
    assert all(torch.equal(value, together(rows)[name]) for name, value in batch.items())
    assert together(rows[:2])["pixel_mask"].tolist() == [[[1, 0]], [[1, 1]]]
    plain = {"image_embeds": torch.ones(2, 4, 3)}
    assert torch.equal(together(apart(plain))["image_embeds"], plain["image_embeds"])


# ---------------------------------------------------------------------------------------------- two stages


def test_all_candidates_equal_the_whole_evaluation():
    whole = evaluate()
    candidates = Candidates(first_stage(), images=IMAGES, captions=CAPTIONS)
    both = evaluate(candidates=candidates)
    assert ranked(both) == whole.metrics and torch.equal(both.scores(), whole.scores())
    assert both.top(4) == whole.top(4)
    fewer = evaluate(candidates=Candidates(first_stage(), images=2, captions=4))
    assert ranked(fewer) != whole.metrics


def test_the_fusion_model_orders_what_the_first_proposes():
    first, model = first_stage(), PairModel()
    candidates = Candidates(first, images=3, captions=4, source="a model of towers")
    report = evaluate(model, candidates=candidates, pair_batch_size=8)
    assert candidates.to_image.sum(dim=0).tolist() == [3] * CAPTIONS
    assert candidates.to_text.sum(dim=1).tolist() == [4] * IMAGES
    wanted = candidates.to_image | candidates.to_text
    assert len(model.scored) == int(wanted.sum()) == report.counts["pairs_scored"] < IMAGES * CAPTIONS
    whole = evaluate().scores()
    torch.testing.assert_close(report.scores()[wanted], whole[wanted], rtol=0, atol=1e-6)
    assert torch.equal(report.scores().isinf(), ~wanted)
    for text, (_, _, found) in enumerate(report.top(5)):
        best = first[:, text].topk(3).indices
        assert found == best[whole[best, text].argsort(descending=True)].tolist()
    assert "a model of towers proposes k = 3 images for each caption and 4 captions for each image" in report.protocol
    with pytest.raises(ValueError, match="the folds need the scores of all pairs"):
        report.five_fold_1k()


def test_the_first_score_counts_as_much_as_its_weight():
    first, whole = first_stage(), evaluate().scores()
    report = evaluate(candidates=Candidates(first, images=3, captions=4, weight=0.5))
    alone = evaluate(candidates=Candidates(first, images=3, captions=4))
    scored = ~alone.scores().isinf()
    assert torch.equal(report.scores().isinf(), ~scored)
    torch.testing.assert_close(report.scores()[scored], (whole + 0.5 * first)[scored], rtol=0, atol=1e-6)
    assert "and 0.5 times its own score added" in report.protocol and "times" not in alone.protocol
    assert ranked(report) != ranked(alone)


def test_both_stages_are_told():
    candidates = Candidates(first_stage(), images=3, captions=4, source="a model of towers")
    report, whole = evaluate(candidates=candidates), evaluate()
    ids = report.image_ids, report.text_ids
    first = {
        name.removeprefix("first_stage/"): value for name, value in report.metrics.items() if name not in ranked(report)
    }
    assert (
        first == score_metrics(candidates.scores, *ids) != ranked(report)
        and report.metrics.keys() > whole.metrics.keys()
    )
    table = report.table()
    assert table.startswith("the candidates of a model of towers alone\n") and table.count("text to image") == 2
    assert f"rsum {first['rsum']:.1f}; every pair by a model of towers" in table
    assert f"rsum {report.metrics['rsum']:.1f}; 21 captions" in table and whole.table().count("text to image") == 1


def propose_of(model=None, images=3, captions=4, **options):
    model = TwoStageModel() if model is None else model
    return propose(model, PairProcessor(), pair_records(), images, captions, progress=False, **options)


def test_a_model_puts_in_order_what_its_own_embedding_proposes():
    candidates = propose_of()
    pairs, whole = RetrievalSet(pair_records()), brute_force(PairModel())
    report = evaluate(TwoStageModel(), candidates=candidates)
    alone = evaluate_retrieval(TwoStageModel(), PairProcessor(), pair_records(), progress=False)
    assert torch.equal(candidates.scores, alone.scores())
    # every pair one by one, and all but the nearest left out
    ids, own = (pairs.image_ids, pairs.text_ids), report.scores()
    ways = (
        (whole, own, candidates.scores, candidates.to_text, 4, ids),
        (whole.T, own.T, candidates.scores.T, candidates.to_image.T, 3, ids[::-1]),
    )
    for scores, found, near, proposed, k, (queries, targets) in ways:
        ranks = two_stage_ranks(found, near, proposed, queries, targets)
        for row in range(len(queries)):
            nearest = near[row].topk(k).indices
            torch.testing.assert_close(found[row, nearest], scores[row, nearest], rtol=0, atol=1e-6)
            positive = targets[nearest] == queries[row]
            right, wrong = found[row, nearest][positive], found[row, nearest][~positive]
            assert ranks[row] == (wrong >= right.max()).sum() if len(right) else ranks[row] >= k
        assert (ranks < k).any() and (ranks >= k).any()
    assert ranked(report) == two_stage_metrics(whole, candidates, *ids)
    other = evaluate(TwoStageModel(), candidates=Candidates(first_stage(), images=3, captions=4))
    assert ranked(other) != ranked(report) != alone.metrics
    assert "of which its own embedding proposes k = 3 images" in report.protocol


@pytest.mark.parametrize(("batch_size", "pair_batch_size"), [(128, 256), (1, 5), (3, 1), (2, 30)])
@pytest.mark.parametrize("two_stages", [False, True])
def test_sides_encoded_apart_score_as_pairs_do(batch_size, pair_batch_size, two_stages):
    model = TwoStageModel()
    candidates = Candidates(first_stage(), images=2, captions=3) if two_stages else None
    report = evaluate(model, batch_size=batch_size, pair_batch_size=pair_batch_size, candidates=candidates)
    scored, wanted = report.scores().isfinite(), brute_force(PairModel())
    torch.testing.assert_close(report.scores()[scored], wanted[scored], rtol=0, atol=1e-6)
    assert not torch.allclose(wanted[scored], brute_force(PairModel(seed=1))[scored], atol=1e-2)
    assert len(model.scored) == len(set(model.scored)) == int(scored.sum()) and bool(scored.all()) != two_stages
    # every text that is needed is encoded once, and so is every image, with what is attended to of it
    assert len(model.read) == len(set(model.read)) == int(scored.any(dim=0).sum())
    assert sorted(model.attended) == list(range(IMAGES)) and model.encoded == IMAGES
    lengths = TokenizedTexts(PairProcessor(), RetrievalSet(pair_records()).captions).lengths
    least = int((scored * lengths).sum())
    work = sum(count * words for count, words, _ in model.shapes)
    most = sum(int(row.sum()) * int(lengths[row].max()) for row in scored)
    assert work == least if pair_batch_size == 1 else least < work <= most
    assert all(count <= pair_batch_size for count, *_ in model.shapes)


def test_sides_encoded_apart_are_stopped_and_go_on(tmp_path):
    file, candidates = tmp_path / "progress.safetensors", propose_of()
    with pytest.raises(KeyboardInterrupt):
        evaluate(TwoStageModel(stop_after=3), resume=file, pair_batch_size=5, candidates=candidates)
    rest, whole = TwoStageModel(), TwoStageModel()
    report = evaluate(rest, resume=file, pair_batch_size=5, candidates=candidates)
    assert torch.equal(report.scores(), evaluate(whole, pair_batch_size=5, candidates=candidates).scores())
    assert 0 < len(rest.scored) < len(whole.scored) and len(rest.attended) < IMAGES
    again = TwoStageModel()
    evaluate(again, resume=file, candidates=candidates)
    assert not (again.scored or again.read or again.encoded)


def test_what_cannot_be_proposed():
    for numbers, message in (
        ({"images": 8}, "k = 8 images for each caption: there are 7 images to choose from. Ask for 1 to 7"),
        ({"captions": 22}, "k = 22 captions for each image: there are 21"),
        ({"captions": 0}, "k = 0 captions"),
    ):
        model = TwoStageModel()
        with pytest.raises(ValueError, match=message):
            propose_of(model, **numbers)
        assert not model.encoded
    assert propose_of(images=7, captions=21).to_image.all()
    assert embeds_each_side(TwoStageModel()) and not embeds_each_side(PairModel())
    with pytest.raises(TypeError, match="embed one side alone"):
        propose_of(PairModel())


def test_ranks_of_two_stages_by_hand():
    first = torch.tensor([[9.0, 8.0, 7.0, 6.0]] * 3)
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0]] * 3)
    proposed = torch.tensor([[True, True, False, False]] * 3)
    # the second is proposed and wins; of the third and the fourth the first model's rank stays; with two positives the best proposed
    ranks = two_stage_ranks(scores, first, proposed, torch.tensor([5, 6, 7]), torch.tensor([7, 5, 6, 7]))
    assert ranks.tolist() == [0, 2, 1]
    assert ranks_from_scores(scores, torch.tensor([5, 6, 7]), torch.tensor([7, 5, 6, 7])).tolist() == [2, 1, 0]


def test_candidates_that_cannot_be():
    with pytest.raises(ValueError, match="k = 8 images for each caption: there are 7"):
        Candidates(first_stage(), images=8, captions=4)
    with pytest.raises(ValueError, match="k = 22 captions for each image: there are 21"):
        Candidates(first_stage(), images=3, captions=22)
    with pytest.raises(ValueError, match="k = 0 captions"):
        Candidates(first_stage(), images=3, captions=0)
    with pytest.raises(ValueError, match="without NaN"):
        Candidates(first_stage() * torch.nan, images=3, captions=3)
    with pytest.raises(ValueError, match=r"scores \(7, 20\), the records have 7 images and 21 captions"):
        evaluate(candidates=Candidates(first_stage()[:, :20], images=3, captions=3))


# ------------------------------------------------------------------------------------------- going on where it stopped


def test_a_stopped_run_goes_on(tmp_path):
    file = tmp_path / "progress.safetensors"
    stopped = PairModel(stop_after=9)
    with pytest.raises(KeyboardInterrupt):
        evaluate(stopped, resume=file, pair_batch_size=10, batch_size=2)
    rest = PairModel()
    report = evaluate(rest, resume=file, pair_batch_size=10, batch_size=2)
    assert 9 < len(stopped.scored) and len(stopped.scored) + len(rest.scored) == IMAGES * CAPTIONS
    assert not set(stopped.scored) & set(rest.scored)
    whole = evaluate(pair_batch_size=10, batch_size=2)
    torch.testing.assert_close(report.scores(), whole.scores(), rtol=0, atol=1e-6)
    assert report.metrics == whole.metrics
    again = PairModel()
    assert torch.equal(evaluate(again, resume=file).scores(), report.scores()) and not again.scored
    assert not again.encoded and [path.name for path in tmp_path.iterdir()] == [file.name]


def test_other_candidates_take_what_is_there(tmp_path):
    file = tmp_path / "progress.safetensors"
    few, more = (Candidates(first_stage(), images=k, captions=2 * k) for k in (2, 3))
    evaluate(resume=file, candidates=few)
    model = PairModel()
    report = evaluate(model, resume=file, candidates=more)
    whole = evaluate(candidates=more)
    torch.testing.assert_close(report.scores(), whole.scores(), rtol=0, atol=1e-6)
    assert 0 < len(model.scored) == report.counts["pairs_scored"] - evaluate(candidates=few).counts["pairs_scored"]
    # and what is there and not wanted is passed over
    assert torch.equal(evaluate(resume=file, candidates=few).scores().isinf(), ~(few.to_image | few.to_text))


def test_a_file_of_other_scores_is_refused(tmp_path):
    file = tmp_path / "progress.safetensors"
    evaluate(resume=file)
    other = pair_records()
    other[0] = other[0] | {"captions": ["1 2 20", "21"]}
    renamed = [row | {"image_id": f"m{row['image_id']}"} for row in pair_records()]
    for options in (
        {"model": PairModel(seed=1)},
        {"records": other},
        {"records": renamed},
        {"autocast": torch.bfloat16},
        {"prompt": lambda text: f"1 {text}"},
    ):
        with pytest.raises(ValueError, match="holds scores of another model, of other images or captions"):
            evaluate(resume=file, **options)
    (tmp_path / "text.safetensors").write_text("no scores")
    with pytest.raises(ValueError, match="holds no scores in progress"):
        evaluate(resume=tmp_path / "text.safetensors")
    with pytest.raises(ValueError, match="must end in .safetensors"):
        evaluate(resume=tmp_path / "progress.pt")


def test_parts_of_other_processes_are_read(tmp_path):
    """What two processes had written when both were stopped, the second beside the file of the first."""
    path, whole = tmp_path / "progress.safetensors", evaluate().scores()
    texts = TokenizedTexts(PairProcessor(), RetrievalSet(pair_records()).captions)
    names = [f"n{number}" for number in range(IMAGES)]
    fingerprint = run_fingerprint(PairModel(), texts, names, PairProcessor()(images=[0]), None)
    for name, rows in (("progress.safetensors", [0, 2]), ("progress.part1.safetensors", [1])):
        known = torch.full_like(whole, torch.nan)
        known[rows] = whole[rows]
        ProgressFile(tmp_path / name, fingerprint).write(known)
    model = PairModel()
    report = evaluate(model, resume=path)
    assert {image for _, image in model.scored} == {3, 4, 5, 6}
    torch.testing.assert_close(report.scores(), whole, rtol=0, atol=1e-6)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


# ---------------------------------------------------------------------------------------------------- what it says


def test_pairs_and_time_are_told_before(capsys, tmp_path):
    evaluate(progress=True, pair_batch_size=10)
    printed = capsys.readouterr().out
    assert "147 pairs of 7 images and 21 captions to score\n" in printed
    assert "about" in printed and "pairs a second" in printed
    evaluate(progress=True)  # one batch: it is over before anything was measured
    assert "about" not in capsys.readouterr().out
    with pytest.raises(KeyboardInterrupt):
        evaluate(PairModel(stop_after=2), resume=tmp_path / "p.safetensors", pair_batch_size=10)
    evaluate(resume=tmp_path / "p.safetensors", progress=True, pair_batch_size=10)
    assert "127 pairs of 7 images and 21 captions to score, 20 more are there already" in capsys.readouterr().out
    evaluate()
    assert capsys.readouterr().out == ""


def test_durations_in_words():
    assert [duration(s) for s in (40.4, 89.0, 300.0, 7500.0)] == ["40 s", "89 s", "5 min", "2 h 5 min"]


def test_models_and_scores_that_cannot_be_ranked():
    class Towers(torch.nn.Module):
        def get_image_features(self):
            pass

    with pytest.raises(TypeError, match="Towers has no encode_image and no score_pairs: it scores no pairs"):
        evaluate(Towers())
    with pytest.raises(TypeError, match="evaluate_fusion_retrieval"):
        evaluate_retrieval(PairModel(), PairProcessor(), pair_records(), progress=False)
    model = PairModel()
    with torch.no_grad():
        model.words[30] = torch.nan
    with pytest.raises(ValueError, match=r"the score of image \d with caption 10 is nan"):
        evaluate(model)


def test_padding_on_the_left_is_refused():
    class Left(PairProcessor):
        def __call__(self, text=None, **options):
            batch = super().__call__(text=text, **options)
            return {name: value.flip(1) for name, value in batch.items()} if text else batch

    with pytest.raises(ValueError, match="pads on the left"):
        evaluate_fusion_retrieval(PairModel(), Left(), pair_records(), progress=False)
