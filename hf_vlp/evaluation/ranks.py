"""Ranks of the right answers in retrieval, exact and in bounded memory, with any number of right answers a query.

Protocol: VSE++ and its successors (Faghri et al. 2018; Chen et al. 2021, VSE-infinity): the rank of a query is the
best (lowest) rank of any of its positives; recall at k is the share of queries with a rank below k.

Ties count against the query: a wrong target with the very score of the best positive stands before it. A collapsed
model, all of whose scores are equal, thus gets the worst ranks and not the best.
"""

from collections.abc import Mapping, Sequence

import torch

BLOCK_ELEMENTS = 1 << 22  # scores held at a time: 16 MB in float32, about the size of a last-level cache
WHOLE_ELEMENTS = 1 << 27  # scores held at once where that saves computing them twice: 512 MB, 5,000 x 25,000 fit
MISS = torch.iinfo(torch.int64).max  # the rank of a query that has no positive: no k reaches it


def best_ranks(
    queries: torch.Tensor,
    targets: torch.Tensor,
    query_ids: torch.Tensor,
    target_ids: torch.Tensor,
    *,
    block: int | None = None,
) -> torch.Tensor:
    """Rank of each query's best positive by inner product.

    Scores are computed in blocks of queries and dropped: memory is [block, M], never [N, M].

    Args:
        queries: [N, E]. targets: [M, E], same type; half precision is computed in float32.
        query_ids, target_ids: [N] and [M] int64; equal ids are positives.
        block: queries at a time; chosen from M if not given. The result does not depend on it, up to the rounding of
            the matrix product.

    Returns:
        [N] int64, from 0.

    Raises:
        ValueError: shapes that do not fit, features that are not finite, or a query without a positive.
    """
    queries, targets = _checked(queries, targets)
    positives = _Positives.of_ids(query_ids, target_ids, len(queries), len(targets))
    ranks = [queries.new_zeros(0, dtype=torch.int64)]
    for rows in _blocks(len(queries), len(targets), block):
        ranks.append(_block_ranks(queries[rows] @ targets.T, positives, rows))
    return torch.cat(ranks)


def best_ranks_of_pairs(
    queries: torch.Tensor,
    targets: torch.Tensor,
    pairs: torch.Tensor,
    *,
    self_score: float | None = None,
    block: int | None = None,
) -> torch.Tensor:
    """The same where each query has its own list of positives, e.g. annotated ones; a list may be empty.

    Args:
        queries, targets, block: as for `best_ranks`.
        pairs: [Q, 2] int64, the row of a query and the row of a positive of it; in any order, repeated or not.
        self_score: given where queries and targets are the same rows: what a row scores with itself.

    Returns:
        [N] int64, from 0; `MISS` for a query without a positive.

    Raises:
        ValueError: shapes that do not fit, a pair that names no row, or features that are not finite.
    """
    if self_score is not None and len(queries) != len(targets):
        raise ValueError(f"{len(queries)} queries and {len(targets)} targets are not the same rows; omit self_score.")
    queries, targets = _checked(queries, targets)
    positives = _Positives.of_pairs(pairs, len(queries), len(targets))
    ranks = [queries.new_zeros(0, dtype=torch.int64)]
    for rows in _blocks(len(queries), len(targets), block):
        scores = queries[rows] @ targets.T
        if self_score is not None:
            scores.diagonal(rows.start).fill_(self_score)
        ranks.append(_block_ranks(scores, positives, rows))
    return torch.cat(ranks).masked_fill_(positives.counts.to(queries.device) == 0, MISS)


def ranks_from_scores(
    scores: torch.Tensor, query_ids: torch.Tensor, target_ids: torch.Tensor, *, block: int | None = None
) -> torch.Tensor:
    """The same from given scores, e.g. of a fused model or an ensemble.

    Args:
        scores: [N, M], higher is better.
        query_ids, target_ids, block: as for `best_ranks`.

    Returns:
        [N] int64, from 0.

    Raises:
        ValueError: shapes that do not fit, NaN scores, or a query without a positive.
    """
    if scores.ndim != 2:
        raise ValueError(f"scores must be [N, M], not {tuple(scores.shape)}.")
    if scores.isnan().any():
        raise ValueError(f"the scores of query {int(scores.isnan().any(1).nonzero()[0])} hold NaN.")
    positives = _Positives.of_ids(query_ids, target_ids, *scores.shape)
    ranks = [torch.zeros(0, dtype=torch.int64, device=scores.device)]
    for rows in _blocks(*scores.shape, block):
        ranks.append(_block_ranks(scores[rows], positives, rows))
    return torch.cat(ranks)


def ranks_both_ways(
    images: torch.Tensor, texts: torch.Tensor, image_ids: torch.Tensor, text_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`best_ranks` of the images among the texts and of the texts among the images.

    Up to 5,000 x 25,000 and a little more, the scores are computed once for both; beyond, once a direction and in blocks.

    Args:
        images: [N, E]. texts: [M, E].
        image_ids, text_ids: [N] and [M] int64; equal ids are positives.

    Returns:
        [N] and [M] int64, from 0.

    Raises:
        ValueError: as `best_ranks`.
    """
    if len(images) * len(texts) > WHOLE_ELEMENTS:
        return best_ranks(images, texts, image_ids, text_ids), best_ranks(texts, images, text_ids, image_ids)
    scores = _widened("images", images) @ _widened("texts", texts).T
    return ranks_from_scores(scores, image_ids, text_ids), ranks_from_scores(scores.T, text_ids, image_ids)


def top_targets(queries: torch.Tensor, targets: torch.Tensor, k: int, *, block: int | None = None) -> torch.Tensor:
    """The k best targets of each query, best first.

    Args:
        queries: [N, E]. targets: [M, E].
        k: how many; at most M are returned.

    Returns:
        [N, min(k, M)] int64.
    """
    queries, targets = _widened("queries", queries), _widened("targets", targets)
    k = min(k, len(targets))
    found = [torch.zeros(0, k, dtype=torch.int64, device=queries.device)]
    for rows in _blocks(len(queries), len(targets), block):
        found.append((queries[rows] @ targets.T).topk(k, dim=1).indices)
    return torch.cat(found)


def recalls(ranks: torch.Tensor, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Recalls in percent, and the median and mean rank counted from 1.

    Args:
        ranks: [N] int64, from 0, at least one.

    Returns:
        `R@k` for each k, `median_rank` (median rounded down, plus 1) and `mean_rank` (mean plus 1).
    """
    if not len(ranks):
        raise ValueError("there are no ranks: no query was given.")
    ordered = ranks.double().sort().values
    middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    result = {f"R@{k}": 100.0 * float((ranks < k).double().mean()) for k in ks}
    return result | {"median_rank": float(middle.floor()) + 1, "mean_rank": float(ordered.mean()) + 1}


def rsum(*directions: Mapping[str, float]) -> float:
    """Sum of the recalls of the given directions (six for the usual two times R@1, R@5, R@10)."""
    return sum(value for direction in directions for name, value in direction.items() if name.startswith("R@"))


class _Positives:
    """For each query the columns of its positives: those of query n are columns[starts[n] : starts[n] + counts[n]]."""

    def __init__(self, columns: torch.Tensor, starts: torch.Tensor, counts: torch.Tensor):
        self.columns, self.starts, self.counts = columns, starts, counts

    @classmethod
    def of_ids(cls, query_ids: torch.Tensor, target_ids: torch.Tensor, queries: int, targets: int) -> "_Positives":
        """Those of equal id; every query must have one."""
        query_ids, target_ids = torch.as_tensor(query_ids).cpu(), torch.as_tensor(target_ids).cpu()
        if query_ids.shape != (queries,) or target_ids.shape != (targets,):
            raise ValueError(
                f"{queries} queries and {targets} targets need one id each; the ids have the shapes "
                f"{tuple(query_ids.shape)} and {tuple(target_ids.shape)}."
            )
        ordered, columns = target_ids.sort(stable=True)
        starts = torch.searchsorted(ordered, query_ids)
        counts = torch.searchsorted(ordered, query_ids, right=True) - starts
        if queries and not counts.all():
            lone = int((counts == 0).nonzero()[0])
            raise ValueError(
                f"query {lone} (id {int(query_ids[lone])}) has no positive among the targets: no rank is defined. "
                f"Leave such queries out, or add their targets."
            )
        return cls(columns, starts, counts)

    @classmethod
    def of_pairs(cls, pairs: torch.Tensor, queries: int, targets: int) -> "_Positives":
        """Those that are listed as (query, target) [Q, 2]."""
        pairs = torch.as_tensor(pairs).cpu()
        if pairs.ndim != 2 or pairs.shape[1] != 2:
            raise ValueError(f"pairs must be [Q, 2], not {tuple(pairs.shape)}.")
        wrong = ((pairs < 0) | (pairs >= torch.tensor([queries, targets]))).any(dim=1)
        if wrong.any():
            first = int(wrong.nonzero()[0])
            raise ValueError(
                f"pair {first} {pairs[first].tolist()} names no row of {queries} queries, {targets} targets."
            )
        query, columns = pairs.unique(dim=0).unbind(dim=1)  # sorted by query, and a tied positive is taken off once
        counts = torch.bincount(query, minlength=queries)
        return cls(columns, counts.cumsum(0) - counts, counts)

    def of(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Row within the block and column of every positive pair of these queries."""
        starts, counts = self.starts[rows], self.counts[rows]
        row = torch.repeat_interleave(torch.arange(len(counts)), counts)
        within = torch.arange(len(row)) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
        return row, self.columns[starts[row] + within]


def _block_ranks(scores: torch.Tensor, positives: _Positives, rows: slice) -> torch.Tensor:
    row, column = (index.to(scores.device) for index in positives.of(rows))
    good = scores[row, column]
    best = good.new_full((len(scores),), -torch.inf).scatter_reduce_(0, row, good, "amax")
    # no positive beats the best one: all that reach it are negatives, but for the positives that tie
    # int32: ten times the speed of count_nonzero on the CPU
    reached = (scores >= best[:, None]).sum(dim=1, dtype=torch.int32).long()
    return reached - torch.zeros_like(reached).index_add_(0, row, (good == best[row]).to(reached.dtype))


def _blocks(queries: int, targets: int, block: int | None) -> list[slice]:
    size = block or max(1, BLOCK_ELEMENTS // max(1, targets))
    return [slice(start, min(start + size, queries)) for start in range(0, queries, size)]


def _checked(queries: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if queries.ndim != 2 or targets.ndim != 2 or queries.shape[1] != targets.shape[1]:
        raise ValueError(
            f"queries {tuple(queries.shape)} and targets {tuple(targets.shape)} must be [N, E] and [M, E]."
        )
    return _widened("queries", queries), _widened("targets", targets)


def _widened(name: str, features: torch.Tensor) -> torch.Tensor:
    features = features.float() if features.dtype in (torch.float16, torch.bfloat16) else features
    finite = features.isfinite()
    if not finite.all():
        raise ValueError(f"row {int((~finite.all(1)).nonzero()[0])} of the {name} is not finite.")
    return features
