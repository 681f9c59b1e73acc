"""Functions that tests run on several ranks."""

import contextlib
import os
from unittest import mock

import torch


def world_size(rank, num_ranks):
    return torch.distributed.get_world_size()


def gathered(rank, num_ranks, sizes):
    from openclip_ext.ops.gather import gather_rows, gather_sizes

    own = torch.full((sizes[rank], 2), float(rank))
    return gather_rows(own, gather_sizes(len(own), num_ranks, own.device))


def fails_on_rank_one(rank, num_ranks):
    if rank == 1:
        raise ValueError("rank one is unwell")
    torch.distributed.barrier()


def sharded_model(rank, num_ranks, model_config):
    """A small model sharded as `openclip-ext train` does: (features before, after, units, weights before, after)."""
    import open_clip
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from torch.distributed.fsdp import FSDPModule

    import sharded_on_cpu  # noqa: F401
    from openclip_ext import upstream
    from openclip_ext.training import sharding

    torch.manual_seed(0)
    model = open_clip.create_model(upstream.register_model_config(model_config), output_dict=True).eval()
    text = torch.arange(24).view(2, 12)

    @torch.no_grad()
    def features():
        return model.encode_image(torch.ones(2, 3, 32, 32)), model.encode_text(text), model(None, text)["logit_scale"]

    before = features(), {key: value.clone() for key, value in model.state_dict().items()}
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks,
                 "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": 2}  # fmt: skip
    with mock.patch.dict(os.environ, {name: str(value) for name, value in variables.items()}):
        accelerator = Accelerator(cpu=True, fsdp_plugin=sharding.fsdp_plugin("no"))
        try:
            sharding.prepare(accelerator, model, torch.optim.SGD(model.parameters()), [])
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
    units = [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]
    return before[0], features(), units, before[1], sharding.whole(model.state_dict(), keep=rank == 0)


def sharded_state(rank, num_ranks):
    """Of a model of odd shapes, sharded where there are ranks: (optimizer state, the same after a round trip, norms).

    The norms are those of the gradients before and after they are clipped to 2.
    """
    from torch.distributed.fsdp import fully_shard

    from openclip_ext.training import sharding

    def trained():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Linear(3, 1))
        other = torch.nn.Parameter(torch.ones(3))
        if num_ranks > 1:
            fully_shard(model)
        optimizer = torch.optim.AdamW([*model.parameters(), other])
        (model(torch.eye(5)).square().sum() * other.square().sum()).backward()
        optimizer.step()
        return optimizer

    optimizer = trained()
    state = sharding.whole(optimizer.state_dict())
    fresh = trained()
    fresh.load_state_dict(sharding.sharded(state, fresh))
    placed = [type(value) for part in fresh.state.values() for value in part.values()]
    assert placed == [type(value) for part in optimizer.state.values() for value in part.values()]
    parameters = fresh.param_groups[0]["params"]
    norms = [sharding.gradient_norm(parameters, clip=2.0), sharding.gradient_norm(parameters, clip=None)]
    return state, sharding.whole(fresh.state_dict()), norms


def evaluated(rank, num_ranks, model_config, source, batch_size, pictures):
    """Metrics of an untrained model on pairs of `source` and on labelled pictures, as between epochs."""
    import contextlib

    import open_clip

    from openclip_ext import upstream
    from openclip_ext.data.listing import list_shards
    from openclip_ext.data.pipeline import eval_loader
    from openclip_ext.data.streams import StreamConfig
    from openclip_ext.data.table import csv_table
    from openclip_ext.evaluation.datasets.class_folders import class_folders
    from openclip_ext.evaluation.datasets.labelled import LabelledBatches, LabelledFiles
    from openclip_ext.evaluation.datasets.probe_sets import probe_data
    from openclip_ext.evaluation.during_training import Evaluator, ZeroShotSet
    from openclip_ext.evaluation.ranks import Ranks

    torch.manual_seed(0)
    name = upstream.register_model_config(model_config)
    model, _, transform = open_clip.create_model_and_transforms(name, output_dict=True)
    tokenizer, ranks = open_clip.get_tokenizer(name), Ranks(rank, num_ranks)
    table = csv_table(source, "filepath", "title", ",") if source.endswith(".csv") else list_shards(source)
    config = StreamConfig(source=table, batch_size=batch_size, image_transform=transform, tokenizer=tokenizer,
                          rank=rank, world_size=num_ranks)  # fmt: skip
    loading = {"batch_size": batch_size, "workers": 0, "ranks": ranks}
    _, samples = class_folders(pictures, "--imagenet-val")
    words = [f"the number {number}" for number in range(23)], ["a {}", "many {}s"]
    evaluator = Evaluator(
        tokenizer=tokenizer,
        device=torch.device("cpu"),
        autocast=contextlib.nullcontext,
        dtype=None,
        pairs=eval_loader(config, workers=0),
        zero_shot=[ZeroShotSet("digits", LabelledBatches(LabelledFiles(samples), transform, **loading), *words)],
        val_frequency=1,
        zeroshot_frequency=1,
        ranks=ranks,
        probe=probe_data(pictures, pictures, transform, **loading),
        progress=False,
    )
    return evaluator.evaluate(model, 1, True), sorted(evaluator.skipped)


def buffers_shared(rank, num_ranks):
    from openclip_ext.evaluation.ranks import Ranks

    layer = torch.nn.BatchNorm1d(3)
    layer(torch.full((2, 3), float(rank + 1)))
    Ranks(rank, num_ranks).share_buffers(layer)
    return layer.running_mean


def recent_steps(rank, num_ranks, name, size):
    """Averaged gradients and state after steps that recent pairs join, of a batch shared by several ranks."""
    import oracles
    from openclip_ext import create_loss
    from openclip_ext.ops.gather import gather_rows, gather_sizes

    recent = {"recent_batches": 2, "recent_check": 1, "recent_enough": 1e9}
    loss = create_loss(name, num_samples=40, rank=rank, world_size=num_ranks, **recent)
    own = slice(rank * size // num_ranks, (rank + 1) * size // num_ranks)
    kept = None
    for step in range(5):
        image, text = (x[own].requires_grad_() for x in oracles.unit(2, size, 4, seed=step, dtype=torch.float32))
        again = {}
        if loss.probe == "keep":
            kept = image.detach(), text.detach()
        elif loss.probe == "encode":
            again = {"image_features_again": kept[0] + 0.001, "text_features_again": kept[1]}
        scale = torch.tensor(5.0, requires_grad=True)
        ids = (torch.arange(size) + 4 * step)[own]
        outputs = loss(image, text, scale, sample_ids=ids, **again)
        outputs["contrastive_loss"].backward()
        loss.commit()
    gathered = [gather_rows(x.grad, gather_sizes(len(x), num_ranks, x.device)) / num_ranks for x in (image, text)]
    total = gather_rows(scale.grad[None], (1,) * num_ranks).sum() / num_ranks
    used, state = float(outputs["recent_batches_used"]), loss.state_dict()
    return {
        "value": outputs["contrastive_loss"].detach(),
        "gradients": [*gathered, total],
        "used": used,
        "state": state,
    }


#: What `tiled_steps` computes: losses with their options, the last one with the terms that sum over pairs.
TILED = {
    "clip": {},
    "dcl": {},
    "batch_corrected": {},
    "sogclr": {},
    "gamma_decomp": {"recent_batches": 0},
    "siglip": {},
    "clip with terms": {"terms": {"geometric_consistency": {}, "feature_separation": {}}},
}


def tiled_steps(rank, num_ranks, sizes, ids, ways):
    """Of each loss, in each way (loss_comm, loss_tile): its value, gradients of this rank's features, of the scale."""
    import oracles
    from openclip_ext import create_loss

    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    found = []
    for comm, tile in ways:
        for name, options in TILED.items():
            torch.manual_seed(1)
            loss = create_loss(
                name.split()[0], num_samples=99, rank=rank, world_size=num_ranks, loss_tile=tile, loss_comm=comm,
                embed_dim=4, image_trunk_dim=4, text_trunk_dim=4, **options,
            ).double()  # fmt: skip
            leaves = [x[own].clone().requires_grad_() for x in oracles.unit(4, sum(sizes), 4, seed=3)]
            image, text, image_aug, text_aug = leaves
            scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
            extra = {"image_features_aug": image_aug, "text_features_aug": text_aug}
            trunks = {f"{key.replace('_', '_trunk_', 1)}": 2 * value for key, value in extra.items()}
            trunks |= {"image_trunk_features": 3 * image, "text_trunk_features": 3 * text}
            extra |= trunks | {"sample_ids": ids[own], "logit_bias": torch.tensor(-1.0, dtype=torch.float64)}
            value = loss(image, text, scale, **extra, output_dict=False)
            used = torch.autograd.grad(value, (*leaves, scale), allow_unused=True, materialize_grads=True)
            found.append((value.detach(), *used))
    return found


def gathered_widths(rank, num_ranks, comm):
    """Numbers per row of all that a step gathers."""
    import oracles
    from openclip_ext import create_loss

    loss = create_loss("dcl", rank=rank, world_size=num_ranks, loss_comm=comm)
    image, text = (x.requires_grad_() for x in oracles.unit(2, 6, 32, seed=rank))
    gather, reduce = torch.distributed.all_gather_into_tensor, torch.distributed.all_reduce
    widths = []
    with (
        mock.patch.object(torch.distributed, "all_gather_into_tensor",
                          lambda found, own: (widths.append(own[:1].numel()), gather(found, own))),
        mock.patch.object(torch.distributed, "all_reduce", lambda own: (widths.append(own.numel()), reduce(own))),
    ):  # fmt: skip
        loss(image, text, torch.tensor(5.0), output_dict=False).backward()
    return widths


def chain_steps(rank, num_ranks, sizes, tile, kernel):
    """Of three steps of emc2: all ranks' averaged gradients, reports, and where the chains are at the end."""
    import oracles
    from openclip_ext import create_loss
    from openclip_ext.ops.gather import gather_rows, gather_sizes

    options = {
        "num_samples": 90,
        "embed_dim": 4,
        "decoupled": False,
        "recent_batches": 1,
        "recent_check": 1,
        "recent_enough": 1e9,
    }
    loss = create_loss("emc2", kernel=kernel, loss_tile=tile, rank=rank, world_size=num_ranks, **options)
    own, found, again = slice(sum(sizes[:rank]), sum(sizes[: rank + 1])), [], {}
    for step in range(4):
        image, text = (x[own].requires_grad_() for x in oracles.unit(2, sum(sizes), 4, seed=step))
        scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
        ids = torch.randperm(90, generator=torch.Generator().manual_seed(step))[: sum(sizes)]
        again = again if loss.probe == "encode" else {}
        outputs = loss(image, text, scale, sample_ids=ids[own], **again)
        if loss.probe == "keep":
            again = {"image_features_again": image.detach(), "text_features_again": text.detach()}
        outputs["contrastive_loss"].backward()
        gathered = [gather_rows(x.grad, gather_sizes(len(x), num_ranks, x.device)) for x in (image, text)]
        total = gather_rows(scale.grad[None], (1,) * num_ranks).sum()
        found.append([x.detach() for x in (*outputs.values(), *(x / num_ranks for x in (*gathered, total)))])
        loss.commit()
    assert outputs["recent_batches_used"] == 1
    return found, loss.base.stored_ids(torch.arange(90))


def a_step_that_is_not_taken(rank, num_ranks, shards, bad_rank):
    """What is said of it, where a sample's features are not finite on one rank, and what ends the run."""
    from openclip_ext.data.listing import list_shards
    from openclip_ext.errors import UserError
    from openclip_ext.training.faults import Faults

    rows = []
    faults = Faults(source=list_shards(shards), rank=rank, world_size=num_ranks, samples=256, max_skipped=2,
                    max_bad=0.1, write=rows.append)  # fmt: skip
    batch = {"origins": torch.tensor([[rank, 5], [rank, 6], [3, rank]])}
    features = torch.ones(3, 4)
    if rank == bad_rank:
        features[1, 2] = float("nan")
    values = {"contrastive_loss": torch.tensor(float("nan") if rank == bad_rank else 1.0)}
    finite, sums = faults.are_finite([values["contrastive_loss"]], [("corrupt image", "a.tar", 12)], [rank, 5])
    assert sums == [1, 10]
    errors = []
    for in_row, skipped in ((1, 12), (2, 14)):
        try:
            faults.skip_step(7, 0, in_row, values, [batch], [torch.ones(3, 4), features])
            faults.are_finite([torch.tensor(1.0)], [("corrupt image", f"{rank}.tar", skipped)], [])
        except UserError as error:
            errors.append(str(error))
    try:
        faults.are_finite([torch.tensor(1.0)], [("corrupt image", f"{rank}.tar", 14)], [])
    except UserError as error:
        errors.append(str(error))
    return finite, rows, errors


def saved_after_two_steps(rank, num_ranks, name, options, sizes, path):
    """Write the state of a loss that has taken two steps as a checkpoint."""
    from openclip_ext.testing import checks
    from openclip_ext.testing.checks import evaluate_loss, toy_loss, toy_steps

    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    loss = toy_loss(name, options, rank, num_ranks)
    for step, (image, text, ids) in enumerate(toy_steps()):
        loss.begin_step(step=step, total_steps=2)
        evaluate_loss(loss, checks.ToyModel(loss.needs), image[own], text[own], ids[own])
        loss.commit()
    save_loss(loss, path if rank == 0 else None)


def save_loss(loss, path):
    """Write a checkpoint of a loss and a model of one number."""
    from openclip_ext.training.checkpoint import save_checkpoint

    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    given = {"model": model, "optimizer": optimizer, "scaler": None, "loss": loss, "distributed": False}
    save_checkpoint(path, epoch=1, name="a", **given)


def restored(rank, num_ranks, name, options, path):
    """The whole state of a loss that a checkpoint's was loaded into."""
    from openclip_ext.testing.checks import toy_loss, whole_state
    from openclip_ext.training.checkpoint import load_checkpoint

    loss = toy_loss(name, options, rank, num_ranks)
    assert load_checkpoint(path).restore_loss(loss) == []
    return whole_state(loss)


def cannot_be_saved(rank, num_ranks, path, place):
    """What comes of writing a checkpoint of which the last rank cannot write its part, or the first the rest."""
    from openclip_ext.testing.checks import toy_loss
    from openclip_ext.training import checkpoint

    loss = toy_loss("sogclr", {"rate_shard": True}, rank, num_ranks)

    def full(*given, **named):
        raise OSError(28, "No space left on device")

    with contextlib.ExitStack() as stack:
        if place == "parts" and rank == num_ranks - 1:
            writer = "torch.distributed.checkpoint.filesystem.FileSystem.create_stream"
            stack.enter_context(mock.patch(writer, full))
        if place == "checkpoint":
            stack.enter_context(mock.patch.object(checkpoint, "save_tensors", full))
        try:
            save_loss(loss, path if rank == 0 else None)
        except OSError as error:
            return type(error).__name__


def refused_state(rank, num_ranks, samples, free):
    """What is said of a memory of `samples[rank]`, where so many bytes are free on each rank."""
    from openclip_ext import create_loss
    from openclip_ext.errors import UserError
    from openclip_ext.losses import placement

    memory = (lambda device: (free[rank], free[rank])) if free else placement.memory
    with mock.patch.object(placement, "memory", memory):
        try:
            create_loss("sogclr", num_samples=samples[rank], rank=rank, world_size=num_ranks, rate_shard=True)
        except UserError as error:
            return str(error)


def parts_of_large_state(rank, num_ranks, samples, asks, total):
    """Over how many ranks the rates of so many samples are spread by default, with so much memory on a rank."""
    from openclip_ext.losses import LossContext, ObjectivePlan, placement

    context = LossContext(num_samples=samples, rank=rank, world_size=num_ranks, shards_state=asks)
    with mock.patch.object(placement, "memory", lambda device: (10**9, total)):
        loss = ObjectivePlan("sogclr", {}).build(context)
    assert loss.base.rates.values.shape[1] == samples // loss.base.rates.placement.parts
    return loss.base.rates.placement.parts


def expected_rows(rank, num_ranks, samples):
    """Of rows that were expected, read as such, once more, and where others were: (as they are, found three times).

    And what is said of an id that there is not.
    """
    from openclip_ext.state.exchange import Reader, gather_ids
    from openclip_ext.state.table import Placement, SampleTable

    table = SampleTable((2, samples), torch.float32, 0, "table", Placement(parts=num_ranks, rank=rank))
    table.write(0, torch.arange(samples), torch.arange(samples) + 0.5)
    reader, ids = Reader([table]), torch.arange(rank, samples, num_ranks + 1)
    reader.expect(ids)
    sent_before = gather_ids(ids, table)
    found = [reader.read(sent_before)[0][0], reader.read(sent_before)[0][0]]
    reader.expect(ids)
    table.write(0, torch.arange(samples), torch.zeros(samples))
    found.append(reader.read(sent_before)[0][0])
    try:
        reader.expect(torch.tensor([samples if rank else 0]))
    except IndexError as error:
        return ids + 0.5, found, str(error)
