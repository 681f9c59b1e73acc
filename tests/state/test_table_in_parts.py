"""Tables of which each rank keeps a part, seen from one rank; on several, `openclip_ext.testing` compares them."""

import pytest
import torch

import rank_jobs
from openclip_ext.state import table as table_module
from openclip_ext.state.table import Placement, SampleTable

SAMPLES, PARTS = 10, 4  # blocks of 3, 3, 3 and 1


def part(rank, parts=PARTS):
    return SampleTable((2, SAMPLES, 3), torch.float32, 0, "table", Placement(parts=parts, rank=rank))


@pytest.mark.parametrize("counts", [("cpu",), ()], ids=["as a CPU writes", "as a GPU writes"])
@pytest.mark.parametrize("ids", [[9, 0, 4, 3, 4], [0, 1, 2], [9], [7, 8, 6, 7]])
def test_each_part_takes_the_rows_that_it_keeps_and_no_others(monkeypatch, counts, ids):
    monkeypatch.setattr(table_module, "_COUNTS_AT_ONCE", counts)
    ids = torch.tensor(ids)
    rows, chosen = ids[:, None] + torch.tensor([0.5, 1.5, 2.5]), ids % 3 != 1
    whole, tables = SampleTable((2, SAMPLES, 3), torch.float32, 0, "whole", Placement()), list(map(part, range(PARTS)))
    for table in (whole, *tables):
        table.write(0, ids, rows)
        table.write(1, ids, rows, chosen)
    assert [table.values.shape[1] for table in tables] == [3, 3, 3, 1]
    assert torch.equal(torch.cat([table.values for table in tables], dim=1), whole.values)
    assert whole.values[0].any()


def test_a_rank_beyond_the_samples_keeps_nothing():
    table = part(rank=7, parts=8)  # blocks of 2
    table.write(0, torch.tensor([9]), torch.ones(1, 3))
    assert table.values.shape == (2, 0, 3)


def test_rows_that_were_expected_are_those_of_then(ranks):
    for expected, found, error in ranks.run(rank_jobs.expected_rows, 3, SAMPLES):
        assert len(expected) and all(torch.equal(rows, expected) for rows in found)
        assert error.startswith(f"sample id {SAMPLES} is outside of the table of {SAMPLES} samples")


def test_a_whole_table_is_taken_up_in_parts():
    whole = torch.arange(2 * SAMPLES * 3.0).view(2, SAMPLES, 3)
    for rank, rows in enumerate(whole.split(3, dim=1)):
        table = part(rank)
        table.load_state_dict({"values": whole})
        assert torch.equal(table.values, rows)
    with pytest.raises(RuntimeError, match="size mismatch"):
        part(0).load_state_dict({"values": whole[:, :9]})
