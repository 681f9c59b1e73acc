"""A loss's state that is spread over processes, in checkpoints: kept in parts, for any number of processes."""

import os
import shutil

import pytest
import torch

import rank_jobs
from launching import fork
from openclip_ext.cli import main
from openclip_ext.testing.checks import toy_loss, two_steps
from openclip_ext.training.checkpoint import load_checkpoint
from openclip_ext.training.parts import checkpoint_damage

CASES = {
    "sogclr": {"rate_shard": True},
    "emc2": {"bank_shard": True, "decoupled": False, "gamma": 0.5},
}


def parts_beside(path):
    return sorted(each for each in os.listdir(path.parent) if each.endswith(".parts"))


@pytest.mark.parametrize("name", CASES)
def test_parts_are_taken_up_by_any_number_of_processes_and_whole(ranks, tmp_path, name):
    options, path = CASES[name], tmp_path / "epoch_1.pt"
    expected = ranks.run(two_steps, 4, name, options, [2, 2, 2, 2])[0][-1]["state"]
    ranks.run(rank_jobs.saved_after_two_steps, 4, name, options, [2, 2, 2, 2], str(path))
    assert len(parts_beside(path)) == 1 and checkpoint_damage(str(path)) is None
    for number in (1, 2, 3, 4):
        for state in ranks.run(rank_jobs.restored, number, name, options, str(path)):
            torch.testing.assert_close(state, expected, rtol=0, atol=0, equal_nan=True)
    whole = {key: value is not True and value for key, value in options.items()}
    for state in ranks.run(rank_jobs.restored, 2, name, whole, str(path)):
        torch.testing.assert_close(state, expected, rtol=0, atol=0, equal_nan=True)
    alone = toy_loss(name, options)  # without any group
    load_checkpoint(str(path)).restore_loss(alone)
    torch.testing.assert_close(dict(alone.state_dict()), expected, rtol=0, atol=0, equal_nan=True)


def test_a_whole_checkpoint_is_taken_up_in_parts(ranks, tmp_path):
    path = str(tmp_path / "epoch_1.pt")
    ranks.run(rank_jobs.saved_after_two_steps, 1, "emc2", {}, [8], path)
    expected = load_checkpoint(path).content["loss"]
    for state in ranks.run(rank_jobs.restored, 3, "emc2", {"bank_shard": True}, path):
        torch.testing.assert_close(state, expected, rtol=0, atol=0)


def test_writing_anew_leaves_one_set_of_parts_and_a_failure_the_one_before(ranks, tmp_path):
    path, job = (
        tmp_path / "epoch_latest.pt",
        (rank_jobs.saved_after_two_steps, 2, "sogclr", {"rate_shard": True}, [4, 4]),
    )
    ranks.run(*job, str(path))
    first = parts_beside(path)
    ranks.run(*job, str(path))
    second = parts_beside(path)
    assert len(second) == 1 and second != first
    for place in ("parts", "checkpoint"):
        errors = ranks.run(rank_jobs.cannot_be_saved, 2, str(path), place)
        assert errors == ["OSError", "OSError" if place == "parts" else None]
        assert parts_beside(path) == second and checkpoint_damage(str(path)) is None


def test_a_part_that_is_missing_or_damaged_is_named(ranks, tmp_path):
    path = tmp_path / "epoch_1.pt"
    ranks.run(rank_jobs.saved_after_two_steps, 2, "sogclr", {"rate_shard": True}, [4, 4], str(path))
    (folder,) = parts_beside(path)
    part = path.parent / folder / "shard-00002-model-00001-of-00001.safetensors"
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    named = f"{folder}/{part.name}, a part of its loss's state,"
    assert checkpoint_damage(str(path)) == f"{named} does not fit its checksum"
    part.unlink()
    assert checkpoint_damage(str(path)) == f"{named} is missing"


def test_ranks_that_disagree_or_have_no_room_are_named_before_anything_is_allocated(ranks):
    said = ranks.run(rank_jobs.refused_state, 2, [100, 90], None)
    assert said[0] == said[1] and said[0].startswith("rank 0 has 100 samples and rank 1 has 90: ")
    said = ranks.run(rank_jobs.refused_state, 2, [10**9] * 2, [10**12, 10**9])
    assert said[0] == said[1]
    assert said[0].startswith(
        "a state of 8.0 GB takes 4.0 GB on each rank, and 1.0 GB are free on rank 1; use --loss-arg"
    )


@pytest.mark.parametrize(("samples", "asks", "parts"), [(10**6, True, 2), (10**6, False, 1), (1000, True, 1)])
def test_a_large_state_is_spread_where_the_caller_keeps_parts(ranks, samples, asks, parts):
    assert ranks.run(rank_jobs.parts_of_large_state, 2, samples, asks, 10**7) == [parts] * 2


def test_two_processes_go_on_from_any_step_and_one_from_theirs(train_flags, tmp_path, capsys):
    flags = ("--loss", "sogclr", "--loss-arg", "rate_shard=true", "--batch-size", 16, "--precision", "fp32")
    saving = ("--save-every-steps", 3, "--keep-last", 1)
    again, two = tmp_path / "logs" / "again" / "checkpoints", ("--name", "again", "--resume", "latest")
    assert fork("torchrun", train_flags(*flags, *saving, "--name", "two")).returncode == 0
    assert "rate table: spread over 2 processes" in (tmp_path / "logs/two/out.log").read_text()
    shutil.copytree(tmp_path / "logs" / "two", tmp_path / "logs" / "again")
    assert sorted(name.split(".")[0] for name in os.listdir(again)) == ["epoch_0_step_6"] * 2 + ["epoch_1"] * 2
    (missing,) = again.glob("epoch_1.pt.*/shard-00002*")
    missing.unlink()
    finished = fork("torchrun", train_flags(*flags, *two))
    assert finished.returncode == 0 and "is missing); passed over" in finished.stderr
    states = []
    for name in ("two", "again"):
        assert (
            main(train_flags(*flags, "--name", name, "--epochs", 2, "--resume", "latest", "--max-minutes", 1e-9)) == 0
        )
        (path,) = (tmp_path / "logs" / name / "checkpoints").glob("epoch_1_step_*.pt")
        states.append({key: torch.load(path)[key] for key in ("loss", "state_dict", "optimizer")})
    torch.testing.assert_close(*states, rtol=0, atol=0, equal_nan=True)
