"""VQA's soft accuracy and the form in which answers are compared."""

import itertools

import pytest

from openclip_ext.evaluation.metrics.vqa import normalise_answer, soft_accuracy


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Yes", "yes"),
        ("the  Two\tdogs", "2 dogs"),
        ("none", "0"),
        ("eleven", "eleven"),
        ("a\nred car ", "red car"),
        ("10,000", "10000"),  # a comma between digits: every mark goes
        ("10,000-ish", "10000ish"),
        ("black/white", "black white"),  # between letters: a space
        ("black, white", "black white"),  # beside a space: nothing
        ("what?", "what"),
        ("3.5", "3.5"),
        ("3.", "3"),
        ("e.g. this", "eg this"),
        ("isnt", "isn't"),
        ("couldntve", "couldntve"),  # two are missing
        ("couldn'tve", "couldn't've"),
        ("its", "its"),
        ("dont know", "don't know"),
        ("somebody'd", "somebodyd"),
        ("", ""),
    ],
)
def test_answers_are_compared_in_their_published_form(answer, expected):
    assert normalise_answer(answer) == expected


def test_normalising_twice_is_normalising_once():
    for answer in ("A Dog's bowl.", "10,000 (approx)", "it's a 4x4!", "U.S.A.", "whos that"):
        assert normalise_answer(normalise_answer(answer)) == normalise_answer(answer)


@pytest.mark.parametrize("right", range(11))
def test_the_soft_accuracy_is_the_mean_over_all_nine_of_ten(right):
    given = ["cat"] * right + ["dog"] * (10 - right)
    nines = list(itertools.combinations(given, 9))
    assert len(nines) == 10
    expected = sum(min(1, nine.count("cat") / 3) for nine in nines) / 10
    assert soft_accuracy("The cat", given) == pytest.approx(expected)


def test_one_annotator_is_right_or_wrong():
    assert soft_accuracy("two", ["2"]) == 1 and soft_accuracy("3", ["2"]) == 0
