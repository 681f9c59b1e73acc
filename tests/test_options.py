import dataclasses
from typing import Literal

import pytest

from openclip_ext import UserError, option
from openclip_ext.options import build_options, describe_options, parse_assignments


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    rate: float = option(0.5, "a share", allowed="in (0, 1]", check=lambda value: 0 < value <= 1)
    count: int = option(3, "a number")
    exact: bool = option(False, "a switch")
    kernel: Literal["mh", "isir"] = option("mh", "a choice")
    limit: int | None = option(None, "a bound, or none")


def build(**values):
    return build_options(Options, values, "loss theirs", flag="--loss-arg")


def test_strings_become_the_declared_types():
    built = build(rate="0.25", count="7", exact="yes", kernel="isir", limit="9")
    assert built == Options(rate=0.25, count=7, exact=True, kernel="isir", limit=9)
    assert build(limit="none") == Options()
    assert build(rate=1) == Options(rate=1.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"rat": "1"},
            "--loss-arg rat=1: loss theirs has no option 'rat'; its options: rate, count, exact, kernel, limit",
        ),
        ({"rate": "x"}, r"--loss-arg rate=x: rate of loss theirs must be float in \(0, 1\] \(default 0.5\)"),
        ({"rate": "nan"}, "rate=nan: rate of loss theirs must be float"),
        ({"rate": "0"}, "rate=0: rate of loss theirs must be float"),
        ({"count": "2.5"}, "count of loss theirs must be int"),
        ({"count": 2.5}, "count of loss theirs must be int"),
        ({"count": True}, "count of loss theirs must be int"),
        ({"exact": "maybe"}, "exact of loss theirs must be bool"),
        ({"kernel": "gibbs"}, "kernel of loss theirs must be one of mh, isir"),
        ({"limit": "much"}, "limit of loss theirs must be int or none"),
    ],
)
def test_a_wrong_option_is_named_with_what_is_allowed(values, message):
    with pytest.raises(UserError, match=message):
        build(**values)


def test_assignments_need_a_value_and_come_once():
    assert parse_assignments(["a=1", "b=x=y"], "--loss-arg") == {"a": "1", "b": "x=y"}
    with pytest.raises(UserError, match="--loss-arg a: expected key=value"):
        parse_assignments(["a"], "--loss-arg")
    with pytest.raises(UserError, match="a is given twice"):
        parse_assignments(["a=1", "a=2"], "--loss-arg")


def test_options_describe_themselves():
    assert describe_options(Options)[3] == {
        "name": "kernel", "type": "one of", "default": "mh", "allowed": "mh, isir", "meaning": "a choice"
    }  # fmt: skip
