"""The checks that every loss of this package passes, for losses by other authors."""

import contextlib
import dataclasses
import io
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

from openclip_ext.losses import Objective, create_loss
from openclip_ext.losses.base import total_loss
from openclip_ext.registry import get_spec
from openclip_ext.testing.ranks import RankPool

GLOBAL_BATCH, INPUT, WIDTH, NUM_SAMPLES = 8, 7, 5, 30
VOCABULARY = 9


def check_loss(
    name: str, *, ranks: RankPool | None = None, num_ranks: tuple[int, ...] = (2, 4), gradcheck: bool = True, **options
) -> None:
    """Assert that a registered loss can be trusted in the training loop.

    * gradient: on samples it has not seen, its gradient is that of its value (`torch.autograd.gradcheck`);
    * stages: calling it changes no state before `commit`, and calling it again in the same step gives the same;
    * state: `state_dict` holds all that later calls depend on;
    * precision: under autocast and on half-precision features the value is float32, finite, and close;
    * shards: where an option `…_shard` spreads its state over ranks, everything is what it is without, to the last bit;
    * ranks: N gloo processes give the value (their mean), the averaged gradient and the next state of one process on
      the concatenated batch, to 1e-5, over two steps in which samples change ranks, and the same state after a
      `warm_start` if it has one.

    Call it below `if __name__ == "__main__":` in a script, since the processes import the main module.

    Args:
        name: as in `--loss`.
        ranks: a pool to use; None: one is started for this call, which takes some seconds.
        num_ranks: the numbers of processes to compare with one.
        gradcheck: False for a loss whose gradient is not that of its value by design.
        **options: of the loss, and `terms` as in `create_loss`.

    Raises:
        AssertionError: a check fails; the message begins with its name.
    """
    if gradcheck:
        with _named("gradient"):
            _check_gradient(name, options)
    with _named("stages"):
        _check_stages(name, options)
    with _named("state"):
        _check_state(name, options)
    with _named("precision"):
        _check_precision(name, options)
    with contextlib.nullcontext(ranks) if ranks else RankPool() as pool:
        for number in num_ranks:
            with _named("ranks"):
                check_ranks(pool, name, options, [GLOBAL_BATCH // number] * number)
            with _named("shards"):
                check_shards(pool, name, options, [GLOBAL_BATCH // number] * number)


def check_ranks(pool: RankPool, name: str, options: dict[str, Any], sizes: list[int]) -> None:
    """Assert that ranks with batches of the given sizes, eight pairs in all, equal one process."""
    (single,) = pool.run(two_steps, 1, name, options, [GLOBAL_BATCH])
    several = pool.run(two_steps, len(sizes), name, options, sizes)
    for step, expected in enumerate(single):
        results = [steps[step] for steps in several]
        mean = {key: sum(result["values"][key] for result in results) / len(sizes) for key in expected["values"]}
        for rank, result in enumerate(results):
            torch.testing.assert_close(
                result | {"values": mean}, expected, rtol=1e-5, atol=1e-5, equal_nan=True,
                msg=_prefixed(f"step {step}, rank {rank}"),
            )  # fmt: skip

    if toy_loss(name, options).wants_warm_start:
        (single,), several = (
            pool.run(warm_started, len(shares), name, options, shares) for shares in ([GLOBAL_BATCH], sizes)
        )
        for rank, state in enumerate(several):
            torch.testing.assert_close(
                state, single, rtol=1e-5, atol=1e-5, equal_nan=True,
                msg=_prefixed(f"warm start, rank {rank}"),
            )  # fmt: skip


def check_shards(pool: RankPool, name: str, options: dict[str, Any], sizes: list[int]) -> None:
    """Assert that ranks with batches of the given sizes give the same with their state spread over them as without."""
    shards = [field.name for field in dataclasses.fields(get_spec(name).options) if field.name.endswith("_shard")]
    if not shards:
        return
    for job in (two_steps, warm_started):
        whole, spread = (
            pool.run(job, len(sizes), name, options | dict.fromkeys(shards, shard), sizes) for shard in (False, True)
        )
        torch.testing.assert_close(spread, whole, rtol=0, atol=0, equal_nan=True)


class ToyModel(nn.Module):
    """Linear towers that return what an OpenCLIP model returns, and whatever else a loss may need."""

    teacher: Tensor

    def __init__(self, needs: frozenset[str]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.needs = needs
        self.image = nn.Parameter(torch.randn(INPUT, WIDTH, generator=generator))
        self.text = nn.Parameter(torch.randn(INPUT, WIDTH, generator=generator))
        self.logit_scale = nn.Parameter(torch.tensor(1.6))
        if "logit_bias" in needs:
            self.logit_bias = nn.Parameter(torch.tensor(-2.0))
        self.register_buffer("teacher", torch.randn(2, INPUT, WIDTH, generator=generator))

    def forward(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        trunk = {"image": image @ self.image, "text": text @ self.text}
        out = {f"{key}_features": normalize(value, dim=-1) for key, value in trunk.items()}
        out["logit_scale"] = self.logit_scale.exp()
        if "logit_bias" in self.needs:
            out["logit_bias"] = self.logit_bias
        if "teacher_features" in self.needs:
            out["dist_image_features"] = normalize(image @ self.teacher[0], dim=-1)
            out["dist_text_features"] = normalize(text @ self.teacher[1], dim=-1)
            out["dist_logit_scale"] = torch.tensor(4.0)
        if "caption_logits" in self.needs:
            out["logits"] = (trunk["image"][:, :, None] * trunk["text"][:, None, :])[:, :3]
            out["labels"] = (image[:, :3].abs() * 2).long().clamp_max(WIDTH - 1)
        if "image_aug" in self.needs:
            out["image_features_aug"] = normalize((image + 0.3 * image.roll(1, 1)) @ self.image, dim=-1)
        if "text_aug" in self.needs:
            out["text_features_aug"] = normalize((text + 0.3 * text.roll(1, 1)) @ self.text, dim=-1)
        if "text_tokens" in self.needs:
            out["text_tokens"] = (text.abs() * 4).long().clamp_max(VOCABULARY - 1)
        if "trunk_features" in self.needs:
            out |= {f"{key}_trunk_features": value for key, value in trunk.items()}
            out |= {f"{key}_trunk_features_aug": value + 0.3 * value.roll(1, 1) for key, value in trunk.items()}
        return out


def toy_steps() -> list[tuple[Tensor, Tensor, Tensor]]:
    """Image inputs, text inputs and sample ids of two steps: the same samples, in another order the second time."""
    generator = torch.Generator().manual_seed(5)
    steps = []
    for order in (torch.arange(GLOBAL_BATCH), torch.randperm(GLOBAL_BATCH, generator=generator)):
        image, text = torch.randn(2, GLOBAL_BATCH, INPUT, generator=generator)
        steps.append((image[order], text[order], (torch.arange(GLOBAL_BATCH) * 3)[order]))
    return steps


def evaluate_loss(
    loss: Callable[..., Any], model: Callable[..., dict[str, Tensor]], image: Tensor, text: Tensor, ids: Tensor
) -> dict[str, Tensor]:
    """What the loss, or its `warm_start`, makes of a toy batch."""
    features = model(image, text)
    required = [features.pop(key) for key in ("image_features", "text_features", "logit_scale")]
    return loss(*required, **features, sample_ids=ids)


def toy_loss(name: str, options: dict, rank: int = 0, num_ranks: int = 1) -> Objective:
    """The loss for toy batches, the same on every rank."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return create_loss(
            name, num_samples=NUM_SAMPLES, rank=rank, world_size=num_ranks, embed_dim=WIDTH, image_trunk_dim=WIDTH,
            text_trunk_dim=WIDTH, vocab_size=VOCABULARY, special_token_ids={0}, end_token_id=VOCABULARY - 1, **options,
        )  # fmt: skip


def two_steps(rank: int, num_ranks: int, name: str, options: dict, sizes: list[int]) -> list[dict]:
    """Values, averaged gradients and state after each of two steps at fixed parameters, on one of several ranks."""
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    loss = toy_loss(name, options, rank, num_ranks)
    toy = ToyModel(loss.needs)
    model = DistributedDataParallel(toy) if num_ranks > 1 else toy
    results = []
    for step, (image, text, ids) in enumerate(toy_steps()):
        loss.begin_step(step=step, total_steps=2)
        toy.zero_grad()
        loss.zero_grad()
        if step:  # which a loop may do or not
            loss.expect(ids[own])
        outputs = evaluate_loss(loss, model, image[own], text[own], ids[own])
        total_loss(outputs).backward()
        loss.commit()
        gradients = {key: _gradient(parameter).clone() for key, parameter in toy.named_parameters()}
        for key, parameter in loss.named_parameters():
            if num_ranks > 1:  # as the training loop does
                torch.distributed.all_reduce(_gradient(parameter))
            gradients[key] = _gradient(parameter) / num_ranks
        state = whole_state(loss)
        results.append({"values": {k: v.detach() for k, v in outputs.items()}, "gradients": gradients, "state": state})
    return results


def warm_started(rank: int, num_ranks: int, name: str, options: dict, sizes: list[int]) -> dict[str, Tensor]:
    """State after a warm start on two batches of the same samples, on one of several ranks."""
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    loss = toy_loss(name, options, rank, num_ranks)
    for image, text, ids in toy_steps():
        evaluate_loss(loss.warm_start, ToyModel(loss.needs), image[own], text[own], ids[own])
    return whole_state(loss)


def whole_state(loss: nn.Module) -> dict[str, Tensor]:
    """A copy of its state. A collective call where that is spread over ranks."""
    state = loss.state_dict()
    return {key: value.full_tensor() if isinstance(value, DTensor) else value.clone() for key, value in state.items()}


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _prefixed(place: str) -> Callable[[str], str]:
    return lambda text: f"{place}: {text}"


@contextlib.contextmanager
def _named(check: str):
    try:
        yield
    except (AssertionError, RuntimeError) as error:  # RuntimeError: from gradcheck, or from a rank
        raise AssertionError(f"{check}: {error}") from error


def _fresh(name: str, options: dict) -> tuple[Objective, ToyModel]:
    loss = toy_loss(name, options)
    return loss, ToyModel(loss.needs)


def _check_gradient(name: str, options: dict) -> None:
    loss, model = _fresh(name, options)
    loss, model = loss.double(), model.double()
    image, text, ids = toy_steps()[0]
    names = [key for key, _ in model.named_parameters()]

    def value(*parameters):
        def run(image, text):
            return torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), (image, text))

        return total_loss(evaluate_loss(loss, run, image.double(), text.double(), ids))

    dtype = total_loss(evaluate_loss(loss, model, image.double(), text.double(), ids)).dtype
    assert dtype == torch.float64, f"the value of float64 features is {dtype}; see openclip_ext.promoted"
    parameters = [parameter.detach().clone().requires_grad_() for parameter in model.parameters()]
    torch.autograd.gradcheck(value, parameters)


def _check_stages(name: str, options: dict) -> None:
    loss, model = _fresh(name, options)
    first, second = toy_steps()
    evaluate_loss(loss, model, *first)
    loss.commit()
    before = {key: value.clone() for key, value in loss.state_dict().items()}
    once = evaluate_loss(loss, model, *second)
    torch.testing.assert_close(
        loss.state_dict(), before, equal_nan=True, msg=lambda text: f"forward changed state before commit: {text}"
    )
    again = evaluate_loss(loss, model, *second)
    torch.testing.assert_close(again, once, msg=lambda text: f"a second call in the same step differs: {text}")


def _check_state(name: str, options: dict) -> None:
    (loss, model), (copy, _) = _fresh(name, options), _fresh(name, options)
    first, second = toy_steps()
    evaluate_loss(loss, model, *first)
    loss.commit()
    file = io.BytesIO()
    torch.save(loss.state_dict(), file)
    file.seek(0)
    copy.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(
        evaluate_loss(copy, model, *second),
        evaluate_loss(loss, model, *second),
        msg=lambda text: f"after load_state_dict the loss differs: {text}",
    )


def _check_precision(name: str, options: dict) -> None:
    (loss, model), (copy, _) = _fresh(name, options), _fresh(name, options)
    batch = toy_steps()[0]
    exact = total_loss(evaluate_loss(loss, model, *batch))

    def half(image, text):
        return {key: x.bfloat16() if x.is_floating_point() else x for key, x in model(image, text).items()}

    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = total_loss(evaluate_loss(copy, half, *batch))
    assert rough.dtype == torch.float32, f"the value under autocast is {rough.dtype}, not float32"
    torch.testing.assert_close(rough, exact, rtol=0.05, atol=0.02)
    expected, found = (_feature_gradient(name, options, batch, autocast) for autocast in (False, True))
    torch.testing.assert_close(
        found, expected, rtol=1e-4, atol=1e-6, msg=lambda text: f"the gradient changes under autocast: {text}"
    )


def _feature_gradient(name: str, options: dict, batch: tuple, autocast: bool) -> Tensor:
    """The gradient with respect to image features at a logit scale of 100, where precision shows."""
    loss, model = _fresh(name, options)
    features = {key: value.detach() for key, value in model(*batch[:2]).items()}
    features["image_features"].requires_grad_()
    features["logit_scale"] = torch.tensor(100.0)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        total = total_loss(evaluate_loss(loss, lambda *_: dict(features), *batch))
    return torch.autograd.grad(total, features["image_features"])[0]
