"""Features on disk: taken when they are what would be computed, else computed."""

import json
import os

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from openclip_ext import UserError
from openclip_ext.evaluation.feature_cache import (
    FeatureCache,
    default_folder,
    files_identity,
    model_identity,
    open_cache,
    require_finite,
)
from openclip_ext.evaluation.loading import load_model

TENSORS = {"image": torch.arange(6.0).view(2, 3), "owner": torch.tensor([1, 0])}


class Computed:
    """Makes tensors and counts how often."""

    def __init__(self, tensors=TENSORS):
        self.tensors, self.times = tensors, 0

    def __call__(self):
        self.times += 1
        return self.tensors


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def only_file(folder):
    (path,) = folder.iterdir()  # nothing half written is left
    return path


def test_the_second_time_they_come_from_disk(tmp_path, capsys):
    cache, compute = FeatureCache(str(tmp_path)), Computed()
    for expected in (False, True, True):
        tensors, cached = cache.get({"a": 1}, compute)
        assert equal(tensors, TENSORS) and cached == expected
        assert (f"features taken from {only_file(tmp_path)}" in capsys.readouterr().err) == expected
    assert compute.times == 1
    assert cache.get({"a": 2}, Computed({"image": torch.zeros(1)}))[0]["image"].tolist() == [0]
    assert equal(cache.get({"a": 1}, compute)[0], TENSORS) and compute.times == 1


def test_without_a_folder_or_an_identity_nothing_is_kept(tmp_path):
    compute = Computed()
    for cache, identity in ((FeatureCache(None), {"a": 1}), (FeatureCache(str(tmp_path)), None)):
        for _ in range(2):
            assert cache.get(identity, compute) == (TENSORS, False)
    assert compute.times == 4 and not any(tmp_path.iterdir())


def truncated(path):
    path.write_bytes(path.read_bytes()[:-5])


def one_bit_flipped(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def emptied(path):
    path.write_bytes(b"")


def of_another_identity(path):
    save_file(load_file(path), path, metadata={"identity": "{}", "sha256": "0"})


def without_metadata(path):
    save_file(load_file(path), path)


@pytest.mark.parametrize("damage", [truncated, one_bit_flipped, emptied, of_another_identity, without_metadata])
def test_a_damaged_file_is_said_and_made_anew(tmp_path, capsys, damage):
    cache, compute = FeatureCache(str(tmp_path)), Computed()
    cache.get({"a": 1}, compute)
    damage(only_file(tmp_path))
    tensors, cached = cache.get({"a": 1}, compute)
    assert equal(tensors, TENSORS) and not cached and compute.times == 2
    assert capsys.readouterr().err.count("computed anew") == 1
    assert cache.get({"a": 1}, compute)[1] and only_file(tmp_path)


def test_where_they_cannot_be_written_they_are_used_nonetheless(tmp_path, capsys):
    cache = FeatureCache(str(tmp_path / "gone"))
    tensors, cached = cache.get({"a": 1}, Computed())
    assert equal(tensors, TENSORS) and not cached
    assert "cannot be written" in capsys.readouterr().err


def test_a_folder_is_made_or_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert open_cache(None).folder == default_folder() == str(tmp_path / "openclip-ext" / "features")
    assert os.path.isdir(default_folder())
    assert open_cache(str(tmp_path / "other"), disabled=True).folder is None and not (tmp_path / "other").exists()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--feature-cache .*file: cannot be made a folder .*--no-feature-cache"):
        open_cache(str(tmp_path / "file"))


def test_files_are_told_apart_by_path_size_and_time(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_text("one")
    second.write_text("two")
    os.utime(first, ns=(0, 10))
    os.utime(second, ns=(0, 10))
    seen = [files_identity([str(first), str(second)])]
    assert files_identity([os.path.relpath(first), str(second)]) == seen[0]
    seen.append(files_identity([str(second), str(first)]))
    os.utime(first, ns=(0, 11))
    seen.append(files_identity([str(first), str(second)]))
    first.write_text("longer")
    os.utime(first, ns=(0, 11))
    seen.append(files_identity([str(first), str(second)]))
    assert len(set(seen)) == 4
    assert files_identity([str(first), "https://example.com/a.tar"]) is None


@pytest.fixture
def checkpoint(model_config, tmp_path):
    """A function from changes of the architecture to a loaded model of the same weights."""
    open_clip.add_model_config(model_config)
    path = tmp_path / "weights.pt"
    torch.save(open_clip.create_model("tiny-test").state_dict(), path)

    def load(precision=None, **changes):
        with open(model_config) as file:
            config = json.load(file)
        for key, value in changes.items():
            part = config[f"{key.split('_')[0]}_cfg"] if "_" in key and key != "quick_gelu" else config
            part[key.split("_", 1)[1] if part is not config else key] = value
        changed = tmp_path / "tiny-test.json"
        changed.write_text(json.dumps(config))
        return load_model(str(path), name="tiny-test", model_config=str(changed), device="cpu", precision=precision)

    yield load
    open_clip.add_model_config(model_config)


def test_models_are_told_apart_by_all_that_changes_features(checkpoint):
    identity = model_identity(checkpoint())
    assert model_identity(checkpoint()) == identity and json.loads(json.dumps(identity)) == identity
    # The same weights fit all of these.
    others = [
        model_identity(checkpoint(**change))
        for change in ({"vision_head_width": 8}, {"text_heads": 4}, {"quick_gelu": True}, {"precision": "amp_bf16"})
    ]
    changed = checkpoint()
    changed.model.visual.proj.data[0, 0] += 1e-6  # in memory: the file is the same
    others.append(model_identity(changed))
    larger = checkpoint()
    larger.transform.transforms[0].size = 64
    others.append(model_identity(larger))
    assert all(other != identity for other in others)
    assert len({json.dumps(other) for other in others}) == len(others)


def test_features_that_are_not_finite_are_an_error(checkpoint):
    model = checkpoint()
    assert require_finite(TENSORS, model) is TENSORS
    with pytest.raises(UserError, match=r"--pretrained .*weights.pt: its features are not finite in fp32"):
        require_finite({"image": torch.tensor([1.0, torch.inf])}, model)
