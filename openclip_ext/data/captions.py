"""Captions of a sample, which may be several, and second views of them."""

import dataclasses
import itertools
import random
from collections.abc import Sequence

from openclip_ext.data import tar
from openclip_ext.errors import UserError
from openclip_ext.files import parse_json

# Samples of which one must have a caption under `--caption-key`.
LOOKED_AT = 10_000


DELETED = 0.1  # probability of a word
SWAPPED = 0.1  # swaps per word, at least one


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptionFormat:
    """Where a sample's captions are.

    Attributes:
        separator: splits the caption text into several; None: it is one.
        key: in the sample's JSON, holds a string or a list of strings; None: the caption is the sample's text.
    """

    separator: str | None = None
    key: str | None = None

    def split(self, text: str) -> list[str]:
        """The captions in a text; at least one, which may be empty."""
        if self.separator is None:
            return [text]
        return [part for part in map(str.strip, text.split(self.separator)) if part] or [""]

    def of_sample(self, sample: dict, record: tar.Record, noted: Sequence[str] = ()) -> list[str] | None:
        """The captions of a shard's sample, or None, recorded, where there is none or it cannot be read.

        Args:
            sample: as `tar.read_shard` yields it.
            record: told what is wrong.
            noted: keys, as `sizes.json` has them, that are looked up first where the format names none.
        """
        try:
            texts = _listed(sample, noted if self.key is None else (self.key,))
        except ValueError:
            record(tar.CORRUPT_CAPTION, sample["__url__"], sample["__ordinal__"])
            return None
        if not texts and self.key is None:
            text = tar.decode_caption(sample, record)
            return None if text is None else self.split(text)
        if not texts:
            record(tar.MISSING_CAPTION, sample["__url__"], sample["__ordinal__"])
            return None
        return [part for text in texts for part in self.split(text)]


def _listed(sample: dict, keys: Sequence[str]) -> list[str]:
    """The captions under the first of the keys that the sample's JSON has any under; none without JSON.

    Raises ValueError: it is no JSON, or holds text that no tokenizer takes.
    """
    content = parse_json(sample[tar.JSON_EXTENSION]) if keys and tar.JSON_EXTENSION in sample else None
    if not isinstance(content, dict):
        return []
    for key in keys:
        value = content.get(key)
        texts = [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str) and text]
        if texts:
            "".join(texts).encode()  # not so where JSON escapes half a character
            return texts
    return []


def require_caption_key(urls: Sequence[str], key: str | None) -> None:
    """Raises UserError: `--caption-key` names what none of the first `LOOKED_AT` samples has. The shards are read until
    one has it."""
    if key is None:
        return
    there: set[str] = set()
    samples = (sample for url in urls for sample in tar.read_shard(url, tar.Skips().record))
    number = 0
    for sample in itertools.islice(samples, LOOKED_AT):
        number += 1
        keys = _keys_of_text(sample)
        if key in keys:
            return
        there |= keys
    if number == 0:  # nothing can be read, which is another fault
        return
    has = f"their JSON has text under: {', '.join(sorted(there)[:20])}" if there else "they have no JSON with text"
    raise UserError(
        f"--caption-key {key}: none of the first {number} samples, from {urls[0]} on, has a caption there; {has}"
    )


def _keys_of_text(sample: dict) -> set[str]:
    """The keys of the sample's JSON that could hold captions."""
    try:
        content = parse_json(sample.get(tar.JSON_EXTENSION, b"null"))
        return {key for key in content if _listed(sample, [key])} if isinstance(content, dict) else set()
    except ValueError:
        return set()


def one_view(captions: Sequence[str], rng: random.Random) -> str:
    """Any of a sample's captions."""
    return captions[0] if len(captions) == 1 else rng.choice(captions)


def two_views(captions: Sequence[str], rng: random.Random) -> tuple[str, str]:
    """Two of a sample's captions, or its only one and that with its words changed."""
    if len(captions) > 1:
        first, second = rng.sample(captions, 2)
        return first, second
    return captions[0], changed_words(captions[0], rng)


def changed_words(caption: str, rng: random.Random) -> str:
    """Easy data augmentation without synonyms: each word is deleted with probability 0.1, and a tenth are swapped.

    A caption of one word stays as it is.

    Source: Wei & Zou, "EDA", EMNLP 2019, with its parameters.
    """
    words = caption.split()
    if len(words) < 2:
        return caption
    kept = [word for word in words if rng.random() >= DELETED] or [rng.choice(words)]
    for _ in range(max(1, round(SWAPPED * len(kept))) if len(kept) > 1 else 0):
        first, second = rng.sample(range(len(kept)), 2)
        kept[first], kept[second] = kept[second], kept[first]
    return " ".join(kept)
