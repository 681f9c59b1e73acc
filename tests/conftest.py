import pytest
import torch
from openclip_ext.testing import RankPool


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def ranks():
    with RankPool() as pool:
        yield pool
