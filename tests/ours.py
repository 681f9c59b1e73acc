"""Names of the losses and terms that this package registers, so that a new one is in every test of all; and flags."""

from importlib.metadata import entry_points

from openclip_ext.registry import LOSSES as LOSS_GROUP
from openclip_ext.registry import TERMS as TERM_GROUP


def _names(group):
    points = entry_points(group=group)
    return sorted({point.name for point in points if point.module.split(".")[0] == "openclip_ext"})


LOSSES = _names(LOSS_GROUP)
TERMS = _names(TERM_GROUP)

#: So slow that recent pairs stay fresh, never left out for being of no need, and checked as often as can be.
FRESH = ("--recent-check", 1, "--lr", 1e-5, "--recent-limit", 0.5, "--loss-arg", "recent_enough=inf")
