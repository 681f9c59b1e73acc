"""N ranks equal one: value, averaged gradient, and next state, on real gloo processes."""

import pytest
import rank_jobs
import torch

CASES = [
    ("clip", {}),
    ("siglip", {}),
    ("dcl", {}),
    ("batch_corrected", {}),
    ("sogclr", {"gamma": 0.4}),
    ("gamma_decomp", {"gamma": 0.3, "gamma_decay": 0.0}),
    ("gamma_decomp", {"gamma": 0.3, "gamma_decay": 0.0, "decoupled": True, "draws": 2}),
]


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_n_ranks_equal_one(ranks, name, options, num_ranks):
    (single,) = ranks.run(rank_jobs.two_steps, 1, name, options)
    for several in ranks.run(rank_jobs.two_steps, num_ranks, name, options):
        torch.testing.assert_close(several, single, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("name", ["dcl", "gamma_decomp"])
def test_ranks_with_batches_of_different_size_equal_one(ranks, name):
    (single,) = ranks.run(rank_jobs.two_steps, 1, name, {})
    for several in ranks.run(rank_jobs.two_steps, 3, name, {}, [4, 1, 3]):
        torch.testing.assert_close(several, single, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_the_pool_runs_as_many_ranks_as_asked(ranks):
    assert ranks.run(rank_jobs.world_size, 1) == [1]
    assert ranks.run(rank_jobs.world_size, 3) == [3, 3, 3]


def test_rows_are_gathered_in_rank_order_from_batches_of_any_size(ranks):
    for rows in ranks.run(rank_jobs.gathered, 3, [2, 0, 1]):
        assert rows[:, 0].tolist() == [0.0, 0.0, 2.0]


def test_a_failure_names_its_rank(ranks):
    with pytest.raises(RuntimeError, match="rank 1:(.|\n)*rank one is unwell"):
        ranks.run(rank_jobs.fails_on_rank_one, 2)
    assert ranks.run(rank_jobs.world_size, 2) == [2, 2]
