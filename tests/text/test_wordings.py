"""Wordings: the rules that make a fact checkable, whatever it is about."""

import pytest

from unmask.text.countries import FIELDS
from unmask.text.wordings import WORDINGS, Wordings


def test_every_field_has_five_sentences_and_seven_questions_and_none_is_used_twice() -> None:
    assert tuple(WORDINGS) == FIELDS
    for wordings in WORDINGS.values():
        assert (len(wordings.sentences), len(wordings.questions)) == (5, 7)
    every = [text for wordings in WORDINGS.values() for part in wordings for text in part]
    assert len(set(every)) == len(every)


@pytest.mark.parametrize("wordings", WORDINGS.values(), ids=WORDINGS)
def test_the_country_stands_inside_and_the_answer_last(wordings: Wordings) -> None:
    for sentence in wordings.sentences:
        assert sentence.count("{country}") == sentence.count("{answer}") == 1
        assert sentence.endswith(" {answer}.")
    for question in wordings.questions:
        assert question.count("{country}") == 1
        assert "{answer}" not in question
        assert question[-1] in "?."
    for text in wordings.sentences + wordings.questions:
        assert text[0].isupper()  # so the country is not the first word
        assert " {country}" in text
