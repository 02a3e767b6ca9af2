"""What is taken of an error that is not edgevit's own."""

from __future__ import annotations

import pytest

from edgevit.errors import first_line, last_line


@pytest.mark.parametrize(
    ("message", "first", "last"),
    [
        ("one", "one", "one"),
        ("one\ntwo", "one", "two"),
        ("\n \n  one \r\n\n two \n\t\n", "one", "two"),
        ("", "ValueError", "ValueError"),
        (" \n\t\n", "ValueError", "ValueError"),
    ],
)
def test_one_line_is_taken_of_any_message_and_the_type_of_none(message: str, first: str, last: str) -> None:
    error = ValueError(message)
    assert (first_line(error), last_line(error)) == (first, last)


def test_an_error_without_arguments_has_a_line() -> None:
    assert first_line(KeyboardInterrupt()) == last_line(KeyboardInterrupt()) == "KeyboardInterrupt"
