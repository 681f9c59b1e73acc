import math

import pytest
import torch

from openclip_ext.ops.pairs import gather_pairs
from openclip_ext.state.rate_table import RateTable, blended


def logs(*rates):
    return torch.tensor([rates, [2 * rate for rate in rates]]).log()


def pairs_of(ids):
    features = torch.eye(len(ids))
    return gather_pairs(features, features, torch.tensor(1.0), ids, 0, 1)


def test_a_first_visit_takes_the_estimate_and_later_ones_average_rates():
    table = RateTable(10)
    ids = torch.tensor([3, 7])
    for estimates in ((1.0, 4.0), (3.0, 8.0)):
        table.stage(ids, blended(table.read(ids), logs(*estimates), 0.25))
        table.commit()
    torch.testing.assert_close(table.values[0, ids].exp(), torch.tensor([1.5, 5.0]))
    torch.testing.assert_close(table.values[1, ids].exp(), torch.tensor([3.0, 10.0]))


def test_an_id_staged_twice_gets_the_mean_in_any_order():
    for order in ([0, 1, 2], [2, 0, 1]):
        table = RateTable(4)
        table.stage(torch.tensor([1, 1, 2])[order], logs(1.0, 3.0, 5.0)[:, order])
        table.commit()
        torch.testing.assert_close(table.values[0, 1:3].exp(), torch.tensor([2.0, 5.0]))


def test_rates_far_beyond_the_range_of_float32_average_in_the_log_domain():
    table = RateTable(2)
    table.stage(torch.tensor([0, 0]), torch.tensor([[200.0, 200.0], [-300.0, -300.0]]))
    table.commit()
    assert table.values[:, 0].tolist() == [200.0, -300.0]
    after = blended(table.values[:, :1], torch.tensor([[200.0], [-300.0]]), 0.3)
    torch.testing.assert_close(after, torch.tensor([[200.0], [-300.0]]))


def test_a_step_that_is_not_finite_leaves_no_trace():
    table = RateTable(2)
    table.stage(torch.tensor([0, 1]), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    table.commit()
    table.stage(torch.tensor([0, 1]), torch.tensor([[math.nan, math.inf], [-math.inf, 5.0]]))
    table.commit()
    assert table.values.tolist() == [[1.0, 2.0], [3.0, 5.0]]


def test_commit_writes_what_was_staged_last_and_only_once():
    table = RateTable(2)
    table.commit()
    assert table.values.isnan().all()
    table.stage(torch.tensor([0]), logs(1.0))
    table.stage(torch.tensor([1]), logs(2.0))
    table.commit()
    assert table.values.isnan().tolist() == [[True, False], [True, False]]
    with torch.no_grad():
        table.values.zero_()
    table.commit()
    assert (table.values == 0).all()


@pytest.mark.parametrize("wrong", [-1, 4])
def test_ids_outside_of_the_table_are_refused(wrong):
    with pytest.raises(IndexError, match=f"sample id {wrong} is outside of the rate table of 4 samples"):
        RateTable(4).visit(pairs_of(torch.tensor([0, wrong])), logs(1.0, 1.0), 0.5)
