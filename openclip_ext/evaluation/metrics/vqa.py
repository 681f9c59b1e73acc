"""VQA's soft accuracy, and the form in which it compares answers.

Source: Antol et al., "VQA: Visual Question Answering", ICCV 2015, and the definition at visualqa.org/evaluation.
"""

import re
from collections.abc import Sequence

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_ARTICLES = frozenset({"a", "an", "the"})
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBER_WORDS)}
_PROPER = re.findall(
    r"\S+",
    """ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's i'd've isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
    needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll
    somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd
    there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
    what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
    would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've""",
)
#: Contractions that lack one apostrophe; the one of `somebody'd` is taken away, as the published table has it.
_CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word for word in _PROPER for place, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}


def normalise_answer(answer: str) -> str:
    """An answer as it is compared: lower case, digits for number words, no article, and punctuation as follows.

    A mark is deleted if it stands beside a space, or if the answer holds a number with a comma in it; else it becomes a
    space. Periods stay before digits only. Contractions that lack one apostrophe get it.
    """
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    delete_all = re.search(r"\d,\d", text) is not None
    cleaned = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if beside_space or delete_all else " ")
    cleaned = re.sub(r"\.(?!\d)", "", cleaned)
    words = (_NUMBERS.get(word, word) for word in cleaned.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def soft_accuracy(answer: str, given: Sequence[str]) -> float:
    """`mean over annotators k of min(1, (number of others that gave the answer) / 3)`; all answers are normalised.

    A single annotator, as of generated questions, is right or wrong.
    """
    answer, others = normalise_answer(answer), [normalise_answer(one) for one in given]
    same = sum(other == answer for other in others)
    if len(others) == 1:
        return float(same)
    return sum(min(1.0, (same - (other == answer)) / 3) for other in others) / len(others)
