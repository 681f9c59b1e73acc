"""The chains' kernels against a loop over steps, and against the law they must leave invariant."""

import pytest
import torch

from openclip_ext.losses.emc2.kernels import metropolis_hastings, resampled, states_by_scan, states_by_steps


def slow_chain(scores, start, proposals, noise, burn_in):
    """One anchor at a time, one step at a time."""
    weights, state, moves = torch.zeros_like(scores), start.clone(), 0
    for i in range(len(scores)):
        current = start[i].item()
        for r in range(len(proposals)):
            candidate = proposals[r, i].item()
            if scores[i, candidate] > -torch.inf:
                accepted = current < 0 or -noise[r, i] <= scores[i, candidate] - scores[i, current]
                current, moves = (candidate, moves + 1) if accepted else (current, moves)
            if r >= burn_in and current >= 0:
                weights[i, current] += 1
        state[i] = current
    return weights / weights.sum(1, keepdim=True).clamp_min(1), state, moves / proposals.numel()


@pytest.mark.parametrize("burn_in", [0.0, 0.5])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 8, 33])
def test_the_scan_equals_a_loop_over_steps(steps, burn_in):
    anchors, columns, burn_in = 60, 9, int(burn_in * steps)
    scores = 2 * torch.randn(anchors, columns)
    scores[torch.rand(anchors, columns) < 0.3] = -torch.inf
    scores[0] = -torch.inf
    start = torch.where(torch.rand(anchors) < 0.3, -1, scores.argmax(1))
    start[0] = -1
    proposals, noise = torch.randint(columns, (steps, anchors)), -torch.rand(steps, anchors).log()
    weights, state, acceptance = slow_chain(scores, start, proposals, noise, burn_in)
    visit = metropolis_hastings(scores, start, proposals, noise, burn_in)
    torch.testing.assert_close(visit.weights, weights)
    assert torch.equal(visit.state, state)
    assert visit.acceptance.item() == pytest.approx(acceptance)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 8, 33])
def test_states_of_a_scan_are_those_of_steps(steps):
    score, noise = torch.randn(steps, 40).double(), -torch.rand(steps, 40).double().log()
    score[torch.rand(steps, 40) < 0.3] = -torch.inf
    least = torch.finfo(score.dtype).min
    candidate = torch.stack([score.clamp_min(least), torch.randint(9, (steps, 40)).double()], dim=1)
    state = torch.stack([torch.randn(40).double(), torch.randint(9, (40,)).double()])
    state[:, ::3] = torch.tensor([least, -1.0], dtype=torch.float64)[:, None]
    expected = states_by_steps(score + noise, candidate, state)
    torch.testing.assert_close(states_by_scan(score + noise, candidate.clone(), state), expected, rtol=0, atol=0)
    assert 0 < expected[1].mean() < 1 or steps == 1


def test_resampling_draws_from_the_softmax():
    scores = torch.tensor([[0.0, 1.0, -torch.inf, 2.0]]).expand(40_000, -1)
    visit = resampled(scores, torch.full((40_000,), -1), torch.rand(40_000))
    torch.testing.assert_close(visit.weights, scores.softmax(1))
    shares = visit.state.bincount(minlength=4) / 40_000
    torch.testing.assert_close(shares, scores[0].softmax(0), atol=0.01, rtol=0)
    none = resampled(torch.full((2, 3), -torch.inf), torch.full((2,), -1), torch.rand(2))
    assert none.state.tolist() == [-1, -1] and none.weights.sum() == 0


NEGATIVES, BATCH, CHAINS, VISITS = 30, 10, 20_000, 5


def law_after_visits(kernel, from_batch_alone=False):
    """Chi-square statistic of CHAINS independent states that began with the target law, after VISITS batches each."""
    generator = torch.Generator().manual_seed(1)
    score = 2.0 * torch.randn(NEGATIVES, generator=generator)
    law = score.softmax(0)
    state = torch.multinomial(law, CHAINS, replacement=True, generator=generator)
    for _ in range(VISITS):
        batch = torch.rand(CHAINS, NEGATIVES, generator=generator).argsort(1)[:, :BATCH]
        present = batch == state[:, None]
        extra = torch.where(present.any(1, keepdim=True), -torch.inf, score[state][:, None])
        scores = torch.cat([score[batch], extra], 1)
        start = torch.where(present.any(1), present.int().argmax(1), BATCH)
        if kernel == "isir":
            visit = resampled(scores, start, torch.rand(CHAINS, generator=generator))
        else:
            columns = BATCH if from_batch_alone else BATCH + 1
            proposals = torch.randint(columns, (BATCH, CHAINS), generator=generator)
            noise = -torch.rand(BATCH, CHAINS, generator=generator).log()
            visit = metropolis_hastings(scores, start, proposals, noise, 0)
        state = torch.cat([batch, state[:, None]], 1).gather(1, visit.state[:, None]).squeeze(1)
    expected = CHAINS * law
    return ((state.bincount(minlength=NEGATIVES) - expected) ** 2 / expected).sum().item()


# 99.9 % of a chi-square variable with 29 degrees of freedom is below 58.3.
@pytest.mark.parametrize("kernel", ["mh", "isir"])
def test_100_000_visits_leave_the_softmax_over_all_negatives_invariant(kernel):
    assert law_after_visits(kernel) < 58.3


def test_proposals_from_the_batch_alone_do_not():
    """Why the stored state is among the candidates."""
    assert law_after_visits("mh", from_batch_alone=True) > 200
