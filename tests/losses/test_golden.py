"""Fixed-seed loss curves, kept in `golden.json`: a change of any of them must be meant.

To accept a change: PYTHONPATH=tests python tests/losses/test_golden.py
"""

import json
import pathlib

import pytest
import torch

from openclip_ext import create_loss
from openclip_ext.testing.checks import INPUT, WIDTH, ToyModel, evaluate_loss
from ours import LOSSES

GOLDEN = pathlib.Path(__file__).parent / "golden.json"
CASES = dict.fromkeys(LOSSES, {}) | {
    "emc2": {"bank_dtype": "float32"},
    "emc2 mh": {"bank_dtype": "float32", "kernel": "mh"},
    "gamma_decomp": {"gamma": 0.2},
    "gamma_decomp draws": {"gamma": 0.2, "draws": 2, "decoupled": True},
}


def curve(case):
    """Losses of 12 steps of gradient descent on 24 made-up pairs in batches of 8, in float64."""
    loss = create_loss(case.split()[0], num_samples=24, embed_dim=WIDTH, **CASES[case])
    model = ToyModel(loss.needs).double()
    generator = torch.Generator().manual_seed(11)
    inputs = torch.randn(2, 24, INPUT, generator=generator, dtype=torch.float64)
    values = []
    for step in range(12):
        loss.begin_step(step=step, total_steps=12)
        ids = torch.randperm(24, generator=generator)[:8]
        outputs = evaluate_loss(loss, model, inputs[0, ids], inputs[1, ids], ids)
        model.zero_grad()
        outputs["contrastive_loss"].backward()
        loss.commit()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
        values.append(outputs["contrastive_loss"].item())
    return values


@pytest.mark.parametrize("case", CASES)
def test_the_curve_is_the_one_on_record(case):
    # The rate table is float32.
    assert curve(case) == pytest.approx(json.loads(GOLDEN.read_text())[case], rel=1e-5)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({case: curve(case) for case in CASES}, indent=1) + "\n")
