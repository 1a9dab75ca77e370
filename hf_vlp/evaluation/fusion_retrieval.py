"""Retrieval by a model that reads image and text together, and so must score every pair; whole or in two stages.

Whole: all N * M pairs. In two stages a first model that embeds each side alone, or the same one where it does that too,
proposes some images for each caption and some captions for each image, and the fusion model puts those in order (Li et al.
2021, ALBEF, section 5).

The rank of a query in two stages is that of its best positive among the proposed ones, by the fusion model. Where none is
proposed, it is the rank by the first model: all that is proposed stands before it, and the rest keeps its order.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from hf_vlp.evaluation.encoding import evaluating, without_pictures
from hf_vlp.evaluation.pair_scoring import (
    ProgressFile,
    TokenizedTexts,
    require_pair_scorer,
    run_fingerprint,
    score_wanted,
)
from hf_vlp.evaluation.ranks import ranks_from_scores
from hf_vlp.evaluation.retrieval import (
    RetrievalReport,
    RetrievalSet,
    evaluate_retrieval,
    rank_metrics,
    score_metrics,
    with_captions,
)

FIRST_STAGE = "first_stage/"  # before the names of its metrics


@dataclass
class Candidates:
    """What a first model proposes to be scored.

    scores: [N, M], images x captions, higher is better. images: how many it proposes for each caption. captions: how many
    for each image. source: its name, for the protocol. weight: how much of its score is added to that of the fusion model, whose own
    score decides in the paper; later work ranks by the sum (`weight` 1 and the cosine of each pair).

    Raises:
        ValueError: numbers below 1 or above what is there, or scores of another shape or that are not numbers.
    """

    scores: torch.Tensor
    images: int
    captions: int
    source: str = "another model"
    weight: float = 0.0
    to_image: torch.Tensor = field(init=False, repr=False)  # [N, M] bool, the images of each caption
    to_text: torch.Tensor = field(init=False, repr=False)  # [N, M] bool, the captions of each image

    def __post_init__(self):
        if self.scores.ndim != 2 or self.scores.isnan().any():
            raise ValueError(f"candidates need scores [N, M] without NaN; these are {tuple(self.scores.shape)}.")
        _require_enough(self.scores.shape, self.images, self.captions)
        self.to_image = best_of_rows(self.scores.T, self.images).T
        self.to_text = best_of_rows(self.scores, self.captions)


def embeds_each_side(model: torch.nn.Module) -> bool:
    """Whether a model embeds images and texts alone, itself or in its base model, and so can `propose`."""
    owners = (model, getattr(model, "base_model", None))
    # where features are refused, the verb is there to say so, and none that encodes a text
    verbs = ("encode_text", "get_image_features", "get_text_features")
    return all(any(hasattr(owner, verb) for owner in owners) for verb in verbs)


def propose(
    model: torch.nn.Module,
    processor: Any,
    records: Any,
    images: int,
    captions: int,
    source: str = "its own embedding",
    weight: float = 0.0,
    **options: Any,
) -> Candidates:
    """What a model proposes that embeds each side alone: the pairs whose features are nearest.

    Args:
        model, processor, records: as for `evaluate_retrieval`. images, captions, source, weight: as of `Candidates`.
        options: of `evaluate_retrieval`.

    Raises:
        ValueError, TypeError: as `Candidates`, before anything is encoded, and `evaluate_retrieval`.
    """
    pairs = records if isinstance(records, RetrievalSet) else RetrievalSet(records)
    _require_enough((len(pairs), len(pairs.captions)), images, captions)
    first = evaluate_retrieval(model, processor, pairs, **options).scores()
    return Candidates(first, images, captions, source, weight)


def _require_enough(shape: Sequence[int], images: int, captions: int) -> None:
    """Raise ValueError unless numbers of images and captions can be chosen from [N, M]."""
    for name, other, asked, there in zip(("images", "captions"), ("caption", "image"), (images, captions), shape):
        if not 1 <= asked <= there:
            raise ValueError(
                f"k = {asked} {name} for each {other}: there are {there} {name} to choose from. Ask for 1 to {there}."
            )


def best_of_rows(scores: torch.Tensor, k: int) -> torch.Tensor:
    """[N, M] bool, the k highest of each row of `scores` [N, M]."""
    chosen = torch.zeros(scores.shape, dtype=torch.bool)
    return chosen.scatter_(1, scores.topk(k, dim=1).indices, True)


@dataclass
class FusionRetrievalReport(RetrievalReport):
    """What `evaluate_fusion_retrieval` found; pair_scores [N, M] float32, -inf where a pair was not scored.

    Of two stages the metrics of the first alone stand beside, as `first_stage/image_to_text/R@1`, ...
    """

    pair_scores: torch.Tensor
    candidates: Candidates | None = None

    def table(self) -> str:
        """The metrics as an aligned plain-text table; of two stages that of the first before."""
        if self.candidates is None:
            return super().table()
        alone = {
            name.removeprefix(FIRST_STAGE): value
            for name, value in self.metrics.items()
            if name.startswith(FIRST_STAGE)
        }
        first = replace(self, metrics=alone, protocol=f"every pair by {self.candidates.source}", candidates=None)
        return f"the candidates of {self.candidates.source} alone\n{first.table()}\n\n{super().table()}"

    def scores(self) -> torch.Tensor:
        """[N, M] float32, of every image with every caption; -inf for pairs that nobody proposed."""
        return self.pair_scores

    def top(self, k: int = 5) -> list[tuple[str, int, list[int]]]:
        """For every caption: the text, the index of its image, the indices of the k images found, best first.

        Of two stages at most as many as were proposed.
        """
        scores = self.pair_scores
        if self.candidates is not None:
            scores = scores.masked_fill(~self.candidates.to_image, -torch.inf)
            k = min(k, self.candidates.images)
        return with_captions(self, scores.T.topk(min(k, len(scores)), dim=1).indices)

    def five_fold_1k(self) -> dict[str, float]:
        """See `RetrievalReport.five_fold_1k`.

        Raises:
            ValueError: there are not 5,000 images, or only a part of the pairs was scored.
        """
        if self.candidates is not None:
            raise ValueError("the folds need the scores of all pairs, and candidates leave most out. Evaluate without.")
        return super().five_fold_1k()


def evaluate_fusion_retrieval(
    model: torch.nn.Module,
    processor: Any,
    records: Any,
    *,
    candidates: Candidates | None = None,
    batch_size: int = 128,
    pair_batch_size: int = 256,
    device: torch.device | str | None = None,
    accelerator: Any = None,
    autocast: torch.dtype | None = None,
    prompt: Callable[[str], str] | None = None,
    resume: Any = None,
    progress: bool = True,
) -> FusionRetrievalReport:
    """Score pairs, rank both ways.

    Under several processes (`torch.distributed`) each scores its part, and all get the same report. N images and M captions
    are N * M pairs: hours for COCO's test, minutes with candidates.

    Args:
        model: has `encode_image` and `score_pairs`, see `score_wanted`. Evaluated in evaluation mode, returned in the mode it
            was in.
        processor, records, device, accelerator, autocast, prompt: as for `evaluate_retrieval`.
        candidates: the pairs to score, see `propose`; all if not given.
        batch_size: images encoded at a time. pair_batch_size: pairs scored at a time.
        resume: a .safetensors file. Scores are written to it while they are computed, and those that are there are taken: a
            run that was stopped goes on.
        progress: print how many pairs there are and how long they will take, and show bars.

    Raises:
        ValueError: as `evaluate_retrieval`; candidates of another number of images or captions; a score that is not finite; or
            a file to resume that holds other scores.
        TypeError: the model scores no pairs.
    """
    pairs = records if isinstance(records, RetrievalSet) else RetrievalSet(records)
    shape = (len(pairs), len(pairs.captions))
    if candidates is not None and tuple(candidates.scores.shape) != shape:
        raise ValueError(
            f"the candidates are chosen by scores {tuple(candidates.scores.shape)}, the records have {shape[0]} images and "
            f"{shape[1]} captions. Choose candidates by scores of these records."
        )
    with evaluating(model, accelerator) as inner:
        require_pair_scorer(inner)
        place = torch.device(device) if device is not None else next(inner.parameters()).device
        prepare = partial(pairs.inputs, processor)
        texts = TokenizedTexts(processor, [prompt(text) for text in pairs.captions] if prompt else pairs.captions)
        file = None
        if resume is not None:
            plain = without_pictures(pairs.records)
            names = [plain[row].get("image_id", row) for row in pairs.image_rows]
            file = ProgressFile(resume, run_fingerprint(inner, texts, names, prepare([0]), autocast))
        scores = score_wanted(
            inner,
            prepare,
            texts,
            torch.ones(shape, dtype=torch.bool) if candidates is None else candidates.to_image | candidates.to_text,
            image_batch_size=batch_size,
            pair_batch_size=pair_batch_size,
            device=place,
            autocast=autocast,
            file=file,
            progress=progress,
        )
    if candidates is not None and candidates.weight:
        scores = scores + candidates.weight * candidates.scores.to(scores)
    counts = pairs.counts()
    if candidates is None:
        metrics = score_metrics(scores, pairs.image_ids, pairs.text_ids)
    else:
        ids = pairs.image_ids, pairs.text_ids
        metrics = two_stage_metrics(scores, candidates, *ids)
        metrics |= {FIRST_STAGE + name: value for name, value in score_metrics(candidates.scores, *ids).items()}
        counts |= {"pairs_scored": int((scores > -torch.inf).sum())}
    protocol = _protocol(pairs, candidates)
    return FusionRetrievalReport(
        metrics, counts, protocol, **pairs.identities(), pair_scores=scores, candidates=candidates
    )


def two_stage_metrics(
    scores: torch.Tensor, candidates: Candidates, image_ids: torch.Tensor, text_ids: torch.Tensor
) -> dict[str, float]:
    """Metrics where candidates alone are put in order.

    Args:
        scores: [N, M] of the fusion model; read at the candidates.
        image_ids: [N], text_ids: [M] int64; equal ids belong together.
    """
    return rank_metrics(
        two_stage_ranks(scores, candidates.scores, candidates.to_text, image_ids, text_ids),
        two_stage_ranks(scores.T, candidates.scores.T, candidates.to_image.T, text_ids, image_ids),
    )


def two_stage_ranks(
    scores: torch.Tensor,
    first: torch.Tensor,
    proposed: torch.Tensor,
    query_ids: torch.Tensor,
    target_ids: torch.Tensor,
) -> torch.Tensor:
    """Rank of each query's best positive.

    Args:
        scores: [N, M] of the fusion model. first: [N, M] of the first one. proposed: [N, M] bool, the best by `first` of each
            query, of which `scores` are read.
        query_ids: [N], target_ids: [M] int64; equal ids are positives.

    Returns:
        [N] int64, from 0.
    """
    among = ranks_from_scores(scores.masked_fill(~proposed, -torch.inf), query_ids, target_ids)
    found = (proposed & (query_ids[:, None] == target_ids)).any(dim=1)
    return torch.where(found, among, ranks_from_scores(first, query_ids, target_ids))


def _protocol(pairs: RetrievalSet, candidates: Candidates | None) -> str:
    counts = pairs.counts()
    captions = f"{counts['captions']:,} captions ({counts['captions_per_image_mean']:g} an image)"
    text = f"{captions} against all {counts['images']:,} images, every pair scored"
    if candidates is not None:
        text = (
            f"{captions} against {counts['images']:,} images, of which {candidates.source} proposes k = "
            f"{candidates.images:,} images for each caption and {candidates.captions:,} captions for each image that are "
            f"scored together"
        )
        if candidates.weight:
            text += f" and {candidates.weight:g} times its own score added"
    text += ", best positive counts, ties count against it"
    if pairs.captions_per_image is not None:
        text += f", the first {pairs.captions_per_image} captions of each image"
    return text
