"""Whether JSON from elsewhere is a report of `openclip-ext eval`, so that whoever reads it finds what it looks for."""

from typing import Any

_LARGEST = 1 << 53
_TEXTS = ("path", "source", "sha256")
_COUNTS = ("num_samples", "num_texts", "num_classes", "num_templates", "candidates")


def is_report(value: Any) -> bool:
    """Whether it has the parts of a report, each of its kind."""
    return (
        isinstance(value, dict)
        and isinstance(value.get("created"), str)
        and isinstance(value.get("checkpoint"), dict)
        and all(isinstance(value["checkpoint"].get(name), str | None) for name in _TEXTS)
        and isinstance(value.get("tasks"), dict)
        and all(map(_is_result, value["tasks"].values()))
    )


def _is_result(value: Any) -> bool:
    """Of a task."""
    return (
        isinstance(value, dict)
        and isinstance(value.get("scores"), dict)
        and all(_is_score(score) for score in value["scores"].values())
        and all(_is_count(value.get(name)) for name in _COUNTS)
        and _is_data(value.get("data"))
    )


def _is_data(value: Any) -> bool:
    """What a task says of its data."""
    return value is None or (
        isinstance(value, dict)
        and isinstance(value.get("checksum"), str | None)
        and all(_is_count(value.get(name)) for name in ("images", "texts"))
    )


def _is_count(value: Any) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST)


def _is_score(value: Any) -> bool:
    """Others than numbers are there, and passed over."""
    return not isinstance(value, int) or abs(value) <= _LARGEST
