"""Which samples a step has depends on the seed and the step alone."""

import time
from dataclasses import replace

import pytest
import torch
from folders import EVERY_CHANGE, equal, fresh_settings, opened

import ldm3d.data.batching as batching
from ldm3d.config import InputError
from ldm3d.data import batches, evaluation_batches, open_data


def joined(groups):
    """All samples of micro-batches, as single items in order of position."""
    items = {}
    for batch in (batch for group in groups for batch in group):
        for i, position in enumerate(batch["position"].tolist()):
            assert position not in items
            items[position] = {key: value[i] for key, value in batch.items()}
    return [items[p] for p in sorted(items)]


@pytest.fixture
def training_set(settings):
    config = replace(settings, patch=(8, 8, 8), augment=EVERY_CHANGE, val_fraction=0.2)
    return opened(config).dataset("train", augment=True)


def test_samples_do_not_depend_on_workers_ranks_micro_batches_or_restarts(training_set, monkeypatch):
    reference = joined(batches(training_set, 6, 6, 0, 0, 4))
    assert len(reference) == 24

    def check(items):
        assert len(items) == 24
        assert all(equal(a, b) for a, b in zip(reference, items, strict=True))

    check(joined(batches(training_set, 6, 4, 0, 0, 4)))
    check(joined(batches(training_set, 6, 2, 0, 0, 4, workers=2)))
    check(joined([*batches(training_set, 6, 6, 0, 0, 1), *batches(training_set, 6, 3, 0, 1, 4)]))
    ranked = []
    monkeypatch.setattr(batching, "world_size", lambda: 3)
    for r in range(3):
        monkeypatch.setattr(batching, "rank", lambda r=r: r)
        groups = list(batches(training_set, 6, 1, 0, 0, 4))
        assert [[len(batch["id"]) for batch in group] for group in groups] == [[1, 1]] * 4
        ranked += groups
    check(joined(ranked))


def test_every_epoch_holds_every_case_once_in_an_order_of_its_own(training_set):
    n = len(training_set)
    order = [item["index"].item() for item in joined(batches(training_set, 3, 3, 0, 0, n))]  # 3 epochs
    epochs = [order[i * n : (i + 1) * n] for i in range(3)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_loading_leaves_the_loops_random_state_alone(training_set):
    before = torch.get_rng_state()
    list(batches(training_set, 2, 2, 0, 0, 2))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_evaluation_takes_every_case_once_over_all_ranks(settings, monkeypatch, ranks):
    dataset = opened(settings).dataset("train")
    monkeypatch.setattr(batching, "world_size", lambda: ranks)
    seen = []
    for r in range(ranks):
        monkeypatch.setattr(batching, "rank", lambda r=r: r)
        seen += [i for batch in evaluation_batches(dataset, 2) for i in batch["index"].tolist()]
    assert sorted(seen) == list(range(len(dataset)))


def test_a_batch_that_does_not_divide_over_the_ranks_is_refused(fresh, monkeypatch):
    dataset = open_data(fresh_settings(fresh), "heads", 0).dataset("train")
    monkeypatch.setattr("ldm3d.data.batching.world_size", lambda: 2)
    with pytest.raises(InputError, match="batch_size: 3 does not divide over 2 ranks"):
        next(batches(dataset, 3, 1, 0, 0, 1))


def test_validation_reads_the_next_batch_meanwhile_and_no_more():
    asked = []

    class Cases(list):
        def __getitem__(self, item):
            asked.append(item[1])
            return {"index": item[1]}

    stream = evaluation_batches(Cases(range(7)), 2)
    assert asked == []
    assert next(stream)["index"].tolist() == [0, 1]
    for _ in range(100):
        if len(asked) == 4:
            break
        time.sleep(0.01)
    assert asked == [0, 1, 2, 3]
    assert [batch["index"].tolist() for batch in stream] == [[2, 3], [4, 5], [6]]
    assert list(evaluation_batches(Cases(), 2)) == []
