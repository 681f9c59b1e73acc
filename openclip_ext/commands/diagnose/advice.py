"""What the numbers of `openclip-ext diagnose` mean for who trains, in three sentences."""

from typing import Any

#: Measured by default, from plain to involved: of those that cannot be told apart the first is recommended.
LOSSES = ("clip", "dcl", "batch_corrected", "gamma_decomp", "sogclr", "emc2")
STRAIGHT = 0.95  # cosine from which on a mean gradient counts as that of all pairs
WORTH = 1.25  # times the batch, that a loss must be worth to be recommended
SPREAD = 1.0  # CV^2 below which negatives are nearly alike, as before training


def recommend(report: dict[str, Any]) -> list[str]:
    """Three sentences about the report's `batch_size`: what it costs `clip`, what the best loss gives back, what to do.

    A loss is worth the smaller of its equivalent batches, that of its own target and that of clip's: who aims elsewhere
    may do so more steadily, and still not help. One is recommended that is worth a quarter more than the batch, and
    more than the batch by its interval too, and whose mean does not point clearly worse than that of another such loss;
    of those that lie in the interval of the best, the plainest.
    """
    size = report["batch_size"]
    at = {loss["name"]: _at(loss, size) for loss in report["losses"]}
    best = _best(size, at)
    return [_cost(size, at["clip"]), _gain(size, at, best), _action(report, best)]


def _at(loss: dict, size: int) -> dict:
    return next(row for row in loss["batches"] if row["batch_size"] == size)


def _worth(row: dict) -> dict:
    return min(row["equivalent_batch"], row["clip_equivalent_batch"], key=lambda found: found["value"])


def _best(size: int, at: dict[str, dict]) -> str | None:
    """The loss to recommend; None: `clip`."""
    worth = {name: _worth(row) for name, row in at.items() if name != "clip"}
    above = {
        name: found for name, found in worth.items() if found["value"] >= WORTH * size and found["interval"][0] > size
    }
    if not above:
        return None
    straightest = max(at[name]["direction"]["interval"][0] for name in above)
    above = {name: found for name, found in above.items() if at[name]["direction"]["interval"][1] >= straightest}
    largest = max(above.values(), key=lambda found: found["value"])
    tied = [name for name, found in above.items() if found["value"] >= largest["interval"][0]]
    return min(tied, key=lambda name: (_rank(name), -above[name]["value"]))


def _rank(name: str) -> int:
    plain = name.partition(":")[0]
    return LOSSES.index(plain) if plain in LOSSES else len(LOSSES)


def _cost(size: int, clip: dict) -> str:
    signal, straight = clip["signal"]["value"], clip["direction"]["value"]
    start = f"At batch {size:,} one step of clip has a cosine of {signal:.2f} with the gradient over all pairs"
    if straight >= STRAIGHT:
        return (f"{start}, and the mean of many steps one of {straight:.2f}: the small batch costs noise, which more "
                "steps average out, and hardly any direction.")  # fmt: skip
    low, high = clip["direction"]["interval"]
    if high >= STRAIGHT:
        return f"{start}, and the mean of many steps one of {low:.2f} to {high:.2f}, which more --draws tell better."
    return f"{start}, and the mean of many steps only {straight:.2f}: no number of steps gives back what is lost there."


def _gain(size: int, at: dict[str, dict], best: str | None) -> str:
    if best is not None:
        row = at[best]
        sentence = (f"One step of {best} is worth a batch of {_batch(_worth(row))} of clip's (cosine "
                    f"{row['clip_signal']['value']:.2f})")  # fmt: skip
        mean, clip_mean = row["direction"], at["clip"]["direction"]
        if mean["interval"][1] >= clip_mean["interval"][0]:
            return f"{sentence}."
        return (f"{sentence}, but the mean of many has a cosine of {mean['value']:.2f} alone (clip's: "
                f"{clip_mean['value']:.2f}), so that where steps are many and small it may not help.")  # fmt: skip
    name = max(at, key=lambda name: _worth(at[name])["value"])
    if name == "clip":
        return f"No other loss measured here does better at batch {size:,}."
    worth = _batch(_worth(at[name]))
    return f"No other loss does clearly better: the best, {name}, is worth a batch of {worth} of clip's."


def _action(report: dict, best: str | None) -> str:
    if best is not None:
        probe = "" if report["drift"] or "recent" in best else "; --probe-lr tells whether recent pairs add to it"
        return f"Try: {_flags(best)}{probe}."
    if report["negatives"]["cv2"] < SPREAD:
        return "Keep --loss clip, and look again once the model tells pairs apart better."
    return "Keep --loss clip."


def _flags(name: str) -> str:
    """A name of `--losses` as flags of `train`."""
    loss, _, options = name.partition(":")
    return " ".join([f"--loss {loss}", *(f"--loss-arg {option}" for option in options.split(",") if option)])


def _batch(found: dict) -> str:
    """Two digits are known of it at most."""
    value = found["value"]
    digits = max(0, len(str(round(value))) - 2)
    return f"{'about ' if found['extrapolated'] else ''}{round(value, -digits):,.0f}"
