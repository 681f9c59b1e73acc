"""The one exception that means: the person at the terminal can fix this; and counts in words."""


class UserError(ValueError):
    """A wrong input. The message names the input, its value, and the fix, in one line.

    The command line prints the message without a traceback and exits with code 2.
    """


class RankError(UserError):
    """A wrong input that other ranks may not have noticed: said by every rank that has."""


def counted(number: int, noun: str) -> str:
    """`1 epoch`, `2,000 epochs`, `3 processes`."""
    plural = noun + ("es" if noun.endswith(("s", "tch")) else "s")
    return f"{number:,} {noun if number == 1 else plural}"
