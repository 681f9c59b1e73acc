"""Text without passwords and tokens, for what a run writes: logs, records, cards, reports."""

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"

#: Environment variables with such names hold secrets, wherever their values turn up.
_SECRET_NAMES = re.compile(r"TOKEN|SECRET|PASSW(OR)?D|API_?KEY|ACCESS_?KEY|CREDENTIAL", re.IGNORECASE)
_SHORTEST = 8  # characters of a value that is looked for

#: What stays of a match is its first group.
_SECRETS = [
    re.compile(r"(://)[^/\s:@]+:[^/\s@]+(?=@)"),  # user and password of a URL
    re.compile(r"([?&][\w-]*(?:token|sig|signature|secret|password|credential|key|auth)[\w-]*=)[^&\s'\"]+", re.I),
    re.compile(r"(\b(?:Bearer|Basic)\s+)[\w.~+/=-]{8,}", re.I),
    re.compile(r"(\b[\w-]*(?:token|secret|password|passwd|api[_-]?key)\s*[=:]\s*)[^\s,;'\"]{8,}", re.I),
    re.compile(r"()\b(?:hf_|ghp_|gho_|github_pat_|glpat-|sk-|xox[abp]-)[\w-]{16,}"),
    re.compile(r"()\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
]


def redacted(text: str) -> str:
    """The text with `***` for what looks like a secret, and for values of environment variables that hold one."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and value in text and _SECRET_NAMES.search(name):
            text = text.replace(value, HIDDEN)
    for pattern in _SECRETS:
        text = pattern.sub(rf"\g<1>{HIDDEN}", text)
    return text


def redacted_values(values: Any) -> Any:
    """The same for all text in nested lists, tuples and dicts."""
    if isinstance(values, str):
        return redacted(values)
    if isinstance(values, Mapping):
        return {key: redacted_values(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return type(values)(map(redacted_values, values))
    return values
