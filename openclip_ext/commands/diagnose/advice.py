"""What the numbers of `openclip-ext diagnose` mean for who trains, in three sentences."""

from typing import Any

#: From plain to involved: of losses that cannot be told apart the first is recommended.
PLAIN_FIRST = ("clip", "dcl", "batch_corrected", "gamma_decomp", "sogclr", "emc2")
STRAIGHT = 0.95  # cosine from which on a mean gradient counts as that of all pairs
SAME_TARGET = 0.9  # the same of targets
WORTH = 1.25  # times the batch, that a loss must be worth more than `clip` to be recommended


def recommend(report: dict[str, Any]) -> list[str]:
    """Three sentences about the report's `batch_size`: what it costs `clip`, what the best loss gives back, what to do.

    A loss is recommended where its equivalent batch, interval included, is above the batch by a quarter; of those
    whose equivalent batch lies in the interval of the largest, the plainest.
    """
    size = report["batch_size"]
    at = {loss["name"]: _at(loss, size) for loss in report["losses"]}
    best = _best(report, at)
    return [_cost(report, at["clip"]), _gain(report, at, best), _action(report, at, best)]


def _at(loss: dict, size: int) -> dict:
    return next(row for row in loss["batches"] if row["batch_size"] == size)


def _best(report: dict, at: dict[str, dict]) -> str | None:
    """The loss to recommend; None: `clip`."""
    size = report["batch_size"]
    above = {
        name: row["equivalent_batch"]
        for name, row in at.items()
        if name != "clip" and row["equivalent_batch"]["value"] >= WORTH * size
        if row["equivalent_batch"]["interval"][0] > size
    }
    if not above:
        return None
    largest = max(above.values(), key=lambda found: found["value"])
    tied = [name for name, found in above.items() if found["value"] >= largest["interval"][0]]
    return min(tied, key=lambda name: (_rank(name), -above[name]["value"]))


def _rank(name: str) -> int:
    plain = name.partition(":")[0]
    return PLAIN_FIRST.index(plain) if plain in PLAIN_FIRST else len(PLAIN_FIRST)


def _cost(report: dict, clip: dict) -> str:
    size, straight = report["batch_size"], clip["direction"]["value"]
    start = (
        f"At batch {size:,} one step of clip has a cosine of {_two(clip['signal'])} with the gradient over all pairs"
    )
    if straight >= STRAIGHT:
        return (f"{start}, and the mean of many steps one of {straight:.2f}: the small batch costs noise, which more "
                "steps average out, and no direction.")  # fmt: skip
    return f"{start}, and the mean of many steps only {straight:.2f}: no number of steps gives back what is lost there."


def _gain(report: dict, at: dict[str, dict], best: str | None) -> str:
    size = report["batch_size"]
    if best is None:
        name = max(at, key=lambda name: at[name]["equivalent_batch"]["value"])
        most = at[name]["equivalent_batch"]
        if name == "clip":
            return f"No other loss measured here does better at batch {size:,}."
        return f"No other loss does clearly better: the best, {name}, is worth a batch of {_batch(most)} of clip's."
    row, target = at[best], next(loss for loss in report["losses"] if loss["name"] == best)["target_cosine"]
    worth = _batch(row["equivalent_batch"])
    sentence = f"One step of {best} is worth a batch of {worth} of clip's (cosine {_two(row['signal'])})"
    if target >= SAME_TARGET:
        return f"{sentence}."
    return (f"{sentence}, but towards another target: over all pairs, the two gradients have a cosine of {target:.2f}, "
            f"and with clip's its step has {_two(row['clip_signal'])}.")  # fmt: skip


def _action(report: dict, at: dict[str, dict], best: str | None) -> str:
    drift = report["drift"]
    if best is None:
        again = "" if report["negatives"]["cv2"] > 1 else ", and look again once the model tells pairs apart better"
        return f"Keep --loss clip{again}."
    return f"Try: {_flags(best)}{'' if drift or 'recent' in best else '; --probe-lr tells whether recent pairs help'}."


def _flags(name: str) -> str:
    """A name of `--losses` as flags of `train`."""
    loss, _, options = name.partition(":")
    return " ".join([f"--loss {loss}", *(f"--loss-arg {option}" for option in options.split(",") if option)])


def _two(value: dict) -> str:
    return f"{value['value']:.2f}"


def _batch(found: dict) -> str:
    """Two digits are known of it at most."""
    value = found["value"]
    digits = max(0, len(str(round(value))) - 2)
    return f"{'about ' if found['extrapolated'] else ''}{round(value, -digits):,.0f}"
