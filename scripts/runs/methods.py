"""Losses and their options as one word."""

#: Short for options that are named often.
SHORT = {"recent": "recent_batches", "check": "recent_check", "limit": "recent_limit", "enough": "recent_enough"}


def parse_method(text: str) -> tuple[str, dict[str, str]]:
    """Name and options of `NAME[+OPTION=VALUE…]`."""
    name, *parts = text.split("+")
    options = [part.partition("=") for part in parts]
    return name, {SHORT.get(key, key): value for key, _, value in options}


def place(method: str) -> tuple[int, str]:
    """Where a method stands in a table: what keeps nothing first, then what remembers."""
    order = ("clip", "dcl", "batch_corrected", "sogclr", "gamma_decomp", "emc2")
    name, _ = parse_method(method)
    return (order.index(name) if name in order else len(order)), method
