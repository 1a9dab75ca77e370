"""The batch sampler: no image twice in a batch, each row at most once, the order a function of seed and epoch."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard

from hf_vlp.data.samplers import UniqueImageBatchSampler


def best_number_of_batches(counts, size):
    """By trying: fill each batch with the images that have most rows left, which is optimal."""
    left, batches = Counter(dict(enumerate(counts))), 0
    while True:
        chosen = [image for image, rows in left.most_common(size) if rows > 0]
        if len(chosen) < size:
            return batches
        left.subtract(chosen)
        batches += 1


def check(ids, batches):
    rows = list(itertools.chain(*batches))
    assert len(rows) == len(set(rows))
    for batch in batches:
        assert len({int(ids[row]) for row in batch}) == len(batch)


@pytest.mark.parametrize("seed", range(30))
def test_random_identities(seed):
    generator = np.random.default_rng(seed)
    ids = generator.integers(0, generator.integers(4, 40), size=generator.integers(30, 200))
    size = int(generator.integers(1, 5))
    counts = np.unique(ids, return_counts=True)[1]
    if len(counts) < size:
        size = 1
    full = best_number_of_batches(counts, size)
    dropped = UniqueImageBatchSampler(ids, size, seed=seed)
    kept = UniqueImageBatchSampler(ids, size, seed=seed, drop_last=False)
    for epoch in range(3):
        dropped.set_epoch(epoch)
        kept.set_epoch(epoch)
        batches = list(dropped)
        check(ids, batches)
        assert len(batches) == len(dropped) == full and {len(batch) for batch in batches} <= {size}
        whole = list(kept)
        check(ids, whole)
        assert sorted(itertools.chain(*whole)) == list(range(len(ids))) and len(whole) == len(kept)
        sizes = [len(batch) for batch in whole]
        assert sizes[:full] == [size] * full and max(sizes) <= size


def test_a_plain_batch_sampler_would_repeat_images():
    ids = np.repeat(np.arange(20), 5)
    plain = np.random.default_rng(0).permutation(100).reshape(-1, 10)
    assert any(len(set(ids[batch])) < 10 for batch in plain)
    batches = list(UniqueImageBatchSampler(ids, 10))
    check(ids, batches)
    assert len(batches) == 10


def test_unique_images_give_full_batches_and_a_short_last_one():
    ids = torch.arange(10)
    assert [len(batch) for batch in UniqueImageBatchSampler(ids, 4)] == [4, 4]
    assert [len(batch) for batch in UniqueImageBatchSampler(ids, 4, drop_last=False)] == [4, 4, 2]


def test_one_identity_left():
    ids = [0, 1, 2, 3] + [9] * 6
    dropped = UniqueImageBatchSampler(ids, 2)
    assert [len(batch) for batch in dropped] == [2, 2, 2, 2]  # 9 with each other image
    assert sorted(len(batch) for batch in UniqueImageBatchSampler(ids, 2, drop_last=False)) == [1, 1, 2, 2, 2, 2]
    alone = UniqueImageBatchSampler([5, 5, 5], 4, drop_last=False)
    assert sorted(alone) == [[0], [1], [2]]
    with pytest.raises(ValueError, match="1 different images cannot fill a batch of 4"):
        UniqueImageBatchSampler([5, 5, 5], 4)


def test_the_order_is_a_function_of_seed_and_epoch():
    ids = np.repeat(np.arange(30), 2)
    a, b = UniqueImageBatchSampler(ids, 6, seed=3), UniqueImageBatchSampler(ids, 6, seed=3)
    first = list(a)
    assert first == list(a) == list(b)
    b.set_epoch(1)
    assert list(b) != first
    assert list(UniqueImageBatchSampler(ids, 6, seed=4)) != first
    b.set_epoch(0)
    assert list(b) == first


def test_all_rows_come_up_over_the_epochs():
    ids = [0] * 8 + [1, 2, 3]
    sampler = UniqueImageBatchSampler(ids, 2)
    seen = set()
    for epoch in range(30):
        sampler.set_epoch(epoch)
        seen |= set(itertools.chain(*sampler))
    assert seen == set(range(11))


def test_any_two_images_meet_about_equally_often():
    sampler, meetings = UniqueImageBatchSampler(np.arange(12), 3), Counter()
    for epoch in range(600):
        sampler.set_epoch(epoch)
        for batch in sampler:
            meetings.update(itertools.combinations(sorted(batch), 2))
    # 12 pairs an epoch over 66 possible ones: 109 expected, standard deviation 9.4
    assert len(meetings) == 66 and 60 < min(meetings.values()) and max(meetings.values()) < 160


def test_continuing_inside_an_epoch_equals_never_stopping():
    ids = np.repeat(np.arange(30), 2)
    sampler = UniqueImageBatchSampler(ids, 6)
    sampler.set_epoch(2)
    whole = list(sampler)
    sampler = UniqueImageBatchSampler(ids, 6)
    sampler.set_epoch(2)
    head = list(itertools.islice(sampler, 4))
    state = sampler.state_dict()
    assert head == whole[:4] and (state["epoch"], state["position"]) == (2, 4)
    resumed = UniqueImageBatchSampler(ids, 6)
    resumed.load_state_dict(state)
    resumed.set_epoch(2)  # what a loop says at the start of an epoch
    assert list(resumed) == whole[4:]
    assert list(resumed) == whole  # the next pass is a whole one
    resumed.load_state_dict(sampler.state_dict(position=3))
    assert list(resumed) == whole[3:]
    resumed.load_state_dict(state)
    resumed.set_epoch(3)
    assert len(list(resumed)) == len(whole)
    for other in (
        UniqueImageBatchSampler(ids, 5),
        UniqueImageBatchSampler(ids, 6, seed=1),
        UniqueImageBatchSampler(ids[:58], 6),
    ):
        with pytest.raises(ValueError, match="cannot be continued"):
            other.load_state_dict(state)


def test_accelerate_splits_the_batches_over_processes():
    ids = np.repeat(np.arange(30), 2)
    whole = list(UniqueImageBatchSampler(ids, 6))
    parts = [
        list(BatchSamplerShard(UniqueImageBatchSampler(ids, 6), num_processes=2, process_index=rank))
        for rank in range(2)
    ]
    assert parts[0] == whole[0::2] and parts[1] == whole[1::2]


def test_bad_arguments():
    with pytest.raises(ValueError, match="batch_size=0"):
        UniqueImageBatchSampler([1, 2], 0)
    with pytest.raises(ValueError, match="at least one"):
        UniqueImageBatchSampler([], 2)
    with pytest.raises(ValueError, match="one identity a row"):
        UniqueImageBatchSampler(torch.zeros(2, 2), 2)
