"""Losses come from entry points, ours and strangers' alike."""

import importlib
import pkgutil
import sys
import textwrap

import pytest
import torch

import openclip_ext.losses
import openclip_ext.terms
import ours
from openclip_ext import LossSpec, UserError, create_loss
from openclip_ext.registry import LOSSES, TERMS, all_specs, get_spec, registered_names

PLUGIN = """
import dataclasses
import torch
from openclip_ext import Loss, LossSpec, option

@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    margin: float = option(0.2, "the margin")

class Theirs(Loss):
    def __init__(self, options, context):
        super().__init__(options, context)
        self.margin = torch.nn.Parameter(torch.tensor(options.margin))
        self.register_buffer("steps", torch.zeros(()))

    def compute(self, image_features, text_features, logit_scale):
        gap = (image_features - text_features).square().sum(1).mean()
        return {"KEY": gap + self.margin, "margin": self.margin.detach()}

    def commit(self):
        self.steps += 1

SPEC = LossSpec(name="NAME", summary="a stranger's", options=Options, build=Theirs)
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Put a package with one entry point on the path, as an installer would leave it."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(distribution, module, name, code, group="open_clip.losses"):
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(code))
        info = tmp_path / f"{distribution}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {module}:SPEC\n")
        sys.modules.pop(module, None)

    return install


def plugin(name="theirs", key="contrastive_loss"):
    return PLUGIN.replace("NAME", name).replace("KEY", key)


def features():
    return torch.nn.functional.normalize(torch.randn(2, 4, 3), dim=-1)


@pytest.mark.parametrize(("group", "room"), [(LOSSES, openclip_ext.losses), (TERMS, openclip_ext.terms)])
def test_our_own_are_registered_by_entry_points_and_complete(group, room):
    specs, broken = all_specs(group)
    modules = [
        importlib.import_module(f"{room.__name__}.{found.name}") for found in pkgutil.iter_modules(room.__path__)
    ]
    assert set(specs) == {module.SPEC.name for module in modules if hasattr(module, "SPEC")} and specs
    assert registered_names(group) == sorted(specs) and not broken
    for name, spec in specs.items():
        assert (spec.name, spec.package) == (name, "openclip-ext")
        assert spec.summary and spec.paper


def test_a_strangers_loss_is_found_with_its_options_and_hooks(install):
    install("their-loss", "their_loss", "theirs", plugin())
    assert get_spec("theirs").package == "their-loss"
    loss = create_loss("theirs", num_samples=9, margin="0.5")
    outputs = loss(*features(), torch.tensor(1.0))
    assert outputs["margin"] == 0.5
    loss.begin_step(step=0, total_steps=1)
    loss.commit()
    assert loss.state_dict()["base.steps"] == 1


def test_a_term_is_weighted_and_only_its_losses_are_summed(install):
    install("their-term", "their_term", "pull", plugin("pull", "pull_loss"), group=TERMS)
    image, text = features()
    base = create_loss("dcl", num_samples=9)(image, text, torch.tensor(5.0))
    loss = create_loss("dcl", num_samples=9, terms={"pull": {"weight": 0.25, "margin": 1.0}})
    outputs = loss(image, text, torch.tensor(5.0))
    term = 0.25 * ((image - text).square().sum(1).mean() + 1.0)
    torch.testing.assert_close(outputs["pull_loss"], term)
    torch.testing.assert_close(loss(image, text, torch.tensor(5.0), output_dict=False), base["contrastive_loss"] + term)
    assert outputs["margin"] == 1.0


def test_two_packages_with_one_name_are_both_named(install):
    install("their-loss", "their_loss", "theirs", plugin())
    install("other-loss", "other_loss", "theirs", plugin())
    with pytest.raises(UserError, match="--loss theirs: registered by two packages, other-loss and their-loss"):
        create_loss("theirs", num_samples=9)
    assert set(all_specs()[0]) == set(ours.LOSSES)


def test_a_plugin_that_fails_to_import_is_named_and_the_others_work(install):
    install("sad-loss", "sad_loss", "sad", "import no_such_module")
    with pytest.raises(UserError, match="--loss sad: package sad-loss fails to import .ModuleNotFoundError"):
        create_loss("sad", num_samples=9)
    specs, broken = all_specs()
    assert set(specs) == set(ours.LOSSES) and set(broken) == {"sad"}


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("SPEC = 3", "is a int, not an openclip_ext.LossSpec"),
        (plugin("another"), "registers a spec named 'another' under this name"),
    ],
)
def test_an_entry_point_must_name_a_spec_of_its_own_name(install, code, message):
    install("odd-loss", "odd_loss", "odd", code)
    with pytest.raises(UserError, match=message):
        get_spec("odd")


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(UserError, match="--loss nope: no such loss; registered: .*clip"):
        create_loss("nope", num_samples=9)
    with pytest.raises(UserError, match="--loss-term nope: no such loss term"):
        create_loss("dcl", num_samples=9, terms={"nope": {}})


def test_a_spec_may_only_ask_for_what_exists():
    with pytest.raises(ValueError, match=r"needs \['depth'\]"):
        LossSpec(name="x", summary="x", build=dict, needs=frozenset({"depth"}))
