"""Word-patch alignment: the cost of moving words onto patches (ViLT, https://arxiv.org/abs/2102.03334, section 3.2).

Every word has the same mass and every patch has the same mass, 1 in all on either side. A plan T [L, P] says how much of each word goes to
each patch, moving costs C = 1 - cosine, and the distance of a pair is the sum of C * T over the cheapest plan. The loss draws matching
pairs together and the others apart. Only C has a gradient; the plan counts as given.

The paper finds plans by IPOT (Xie et al., "A Fast Proximal Point Method for Computing Exact Wasserstein Distance",
https://arxiv.org/abs/1802.04307, algorithm 1 with one inner step), as in UNITER. With A = exp(-C / beta) each iteration is

    Q = A * T;   delta = (1 / patches) / (sigma Q);   sigma = (1 / words) / (Q delta);   T = sigma * Q * delta
"""

import torch
from torch import nn

SMALLEST_NORM = 1e-5  # of a state, as in the released code
FAR_AWAY = 1e4  # a cost beside which those of 0 to 2 are nothing


def words_to_align(attention_mask: torch.Tensor) -> torch.Tensor:
    """`attention_mask` [B, L] -> [B, L] bool, true at words: all that is valid but the first and the last, [CLS] and [SEP]."""
    valid = attention_mask.bool()
    before = valid.long().cumsum(dim=1)  # how many valid ones there are up to each place, itself counted
    return valid & before.gt(1) & before.lt(before[:, -1:])


def patches_to_align(image_mask: torch.Tensor) -> torch.Tensor:
    """`image_mask` [B, 1 + P] -> [B, 1 + P] bool, true at real patches: all that is valid but the class token, which is first."""
    patches = image_mask.bool().clone()
    patches[:, 0] = False
    return patches


def cosine_cost(text_states: torch.Tensor, image_states: torch.Tensor) -> torch.Tensor:
    """`text_states` [B, L, D], `image_states` [B, P, D] -> 1 - cosine, [B, L, P] float32 whatever the autocast."""
    with torch.autocast(text_states.device.type, enabled=False):
        words = nn.functional.normalize(text_states.float(), dim=-1, eps=SMALLEST_NORM)
        patches = nn.functional.normalize(image_states.float(), dim=-1, eps=SMALLEST_NORM)
        return 1 - words @ patches.transpose(1, 2)


@torch.no_grad()
def ipot_plan(
    cost: torch.Tensor, words: torch.Tensor, patches: torch.Tensor, *, beta: float = 0.5, iterations: int = 50
) -> torch.Tensor:
    """The plan after a number of IPOT iterations; the more, and the smaller beta, the nearer to the cheapest.

    Args:
        cost: [B, L, P]. words: [B, L], patches: [B, P], true (or 1) where there is something to move. See `transport_plan`.

    Returns:
        [B, L, P]. Each word's row sums to 1 / words; the columns approach 1 / patches.
    """
    with torch.autocast(cost.device.type, enabled=False):
        pairs, word_mass, patch_mass = _masses(words, patches, cost.dtype)
        no_word, no_patch = word_mass.eq(0).to(cost.dtype), patch_mass.eq(0).to(cost.dtype)  # keep 0 / 0 from being
        # A up to a factor for each patch, which delta takes back: a softmax cannot underflow, exp(-C / beta) does for small beta
        affinity = (cost / -beta).masked_fill_(~pairs, torch.finfo(cost.dtype).min).softmax(dim=1).mul_(pairs)
        plan = pairs.to(cost.dtype)
        sigma = word_mass  # [B, 1, L]
        # in place and with the longer axis last: a third of the time of new tensors in the order [B, P, L]
        for _ in range(iterations):
            plan.mul_(affinity)
            delta = patch_mass / torch.baddbmm(no_patch, sigma, plan)  # [B, 1, P]
            sigma = word_mass / torch.baddbmm(no_word, delta, plan.transpose(1, 2))
            plan.mul_(delta).mul_(sigma.transpose(1, 2))
        return plan


@torch.no_grad()
def sinkhorn_plan(
    cost: torch.Tensor, words: torch.Tensor, patches: torch.Tensor, *, beta: float = 0.5, iterations: int = 50
) -> torch.Tensor:
    """The plan of least cost minus beta / iterations times its entropy, by POT in log space. Arguments and result as of `ipot_plan`.

    IPOT after n iterations is a scaling of exp(-n C / beta) as well, whence that weight; what differs is when the scaling is found.
    """
    import ot.batch

    with torch.autocast(cost.device.type, enabled=False):
        pairs, word_mass, patch_mass = _masses(words, patches, cost.dtype)
        # patches first and words last, as IPOT; a pair with nothing to move gets some mass, and its plan is taken away again
        movable = pairs.any(dim=(1, 2), keepdim=True)
        first, last = (torch.where(movable, mass, 1 / mass.shape[2])[:, 0] for mass in (patch_mass, word_mass))
        # POT starts from potentials of 0 at padding too: what is far away has no part in the first scaling
        apart = cost.masked_fill(~pairs, FAR_AWAY).transpose(1, 2)
        options = {"reg": beta / iterations, "max_iter": iterations, "method": "log_sinkhorn", "grad": "detach"}
        return ot.batch.solve_batch(apart, a=first, b=last, **options).plan.transpose(1, 2) * pairs


@torch.no_grad()
def exact_plan(cost: torch.Tensor, words: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
    """The cheapest plan of all, by POT's network simplex: on the CPU in float64, one pair after the other. See `ipot_plan`."""
    import ot

    pairs, word_mass, patch_mass = _masses(words, patches, torch.float64)
    plan = torch.zeros(cost.shape, dtype=torch.float64)
    for row, (one, of_words, of_patches) in enumerate(zip(cost.cpu(), word_mass[:, 0].cpu(), patch_mass[:, 0].cpu())):
        rows, columns = of_words.nonzero()[:, 0], of_patches.nonzero()[:, 0]
        if len(rows):
            within = one.double()[rows[:, None], columns]
            found = ot.emd(of_words[rows].numpy(), of_patches[columns].numpy(), within.numpy())
            plan[row, rows[:, None], columns] = torch.from_numpy(found)
    return plan.to(cost)


def _masses(
    words: torch.Tensor, patches: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Usable pairs [B, L, P] bool, and the mass of each word [B, 1, L] and each patch [B, 1, P].

    They sum to 1, or to 0 for a text without words or an image without patches, where neither side has anything to move.
    """
    pairs = words.bool().unsqueeze(2) & patches.bool().unsqueeze(1)
    word_mass, patch_mass = (pairs.any(dim=axis).to(dtype).unsqueeze(1) for axis in (2, 1))
    counts = [mass.sum(dim=2, keepdim=True).clamp(min=1) for mass in (word_mass, patch_mass)]
    return pairs, word_mass / counts[0], patch_mass / counts[1]


def transport_plan(
    cost: torch.Tensor,
    words: torch.Tensor,
    patches: torch.Tensor,
    *,
    solver: str = "ipot",
    beta: float = 0.5,
    iterations: int = 50,
) -> torch.Tensor:
    """How much of each word goes to each patch, without gradient.

    Args:
        cost: [B, L, P] float32. words: [B, L], patches: [B, P], true (or 1) where there is something to move.
        solver: "ipot", the paper's; "sinkhorn", entropic transport; "exact", the cheapest plan. The last needs neither beta nor
            iterations.

    Returns:
        [B, L, P], 0 where either side is unused, and everywhere for a text without words. The others sum to 1.

    Raises:
        ValueError: an unknown solver, beta or iterations not above 0, masks that do not fit the cost.
    """
    if (words.shape, patches.shape) != (cost.shape[:2], (cost.shape[0], cost.shape[2])):
        raise ValueError(
            f"cost {list(cost.shape)} is [B, L, P], but words are {list(words.shape)} and patches {list(patches.shape)}: give "
            "[B, L] and [B, P]"
        )
    if not (beta > 0 and iterations > 0):
        raise ValueError(f"beta and iterations must be above 0, got {beta} and {iterations}; the paper has 0.5 and 50")
    if solver == "ipot":
        return ipot_plan(cost, words, patches, beta=beta, iterations=iterations)
    if solver == "sinkhorn":
        return sinkhorn_plan(cost, words, patches, beta=beta, iterations=iterations)
    if solver == "exact":
        return exact_plan(cost, words, patches)
    raise ValueError(f"unknown solver {solver!r}: it is 'ipot', 'sinkhorn' or 'exact'")


def transport_distance(cost: torch.Tensor, plan: torch.Tensor) -> torch.Tensor:
    """`cost` and `plan` [B, L, P] -> what moving by the plan costs, [B]; the gradient goes to the cost alone."""
    return (cost * plan.detach()).sum(dim=(1, 2))


def alignment_loss(distances: torch.Tensor, itm_labels: torch.Tensor) -> torch.Tensor:
    """(sum of the `distances` [B] of matching pairs - sum of the others) / B, with `itm_labels` [B], 1 = the pair matches."""
    return torch.where(itm_labels.eq(1), distances, -distances).mean()


def word_patch_alignment_loss(
    text_states: torch.Tensor,
    image_states: torch.Tensor,
    attention_mask: torch.Tensor,
    image_mask: torch.Tensor,
    itm_labels: torch.Tensor,
    *,
    solver: str = "ipot",
    beta: float = 0.5,
    iterations: int = 50,
) -> torch.Tensor:
    """The loss of one batch, before weighting (0.1 in the paper).

    Args:
        text_states: [B, L, D], [CLS] first and [SEP] last among what `attention_mask` [B, L] shows. image_states: [B, 1 + P, D], the class
            token first, with `image_mask` [B, 1 + P].
        itm_labels: [B], 1 = the pair matches.
        solver, beta, iterations: see `transport_plan`.

    Returns:
        float32 scalar, computed in float32 whatever the autocast; below 0 where matching pairs are nearer than the others. A text without
        words adds 0 and has no gradient.

    Raises:
        ValueError: see `transport_plan`.
    """
    cost = cosine_cost(text_states, image_states)
    words, patches = words_to_align(attention_mask), patches_to_align(image_mask)
    plan = transport_plan(cost.detach(), words, patches, solver=solver, beta=beta, iterations=iterations)
    return alignment_loss(transport_distance(cost, plan), itm_labels)
