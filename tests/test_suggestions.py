"""Suggestions ("did you mean"): the known names that are similar to an unknown one."""

from __future__ import annotations

import pytest

from sitelens.suggestions import did_you_mean, nearest


@pytest.mark.parametrize(
    ("name", "n", "expected"),
    [
        ("antonim", 2, "did you mean antonym?"),
        ("ANTONYM", 2, "did you mean antonym?"),
        ("lora", 1, "did you mean LoRA?"),
        ("choose_first", 3, "did you mean choose_first_of_5, choose_first_of_3 or choose_last_of_3?"),
        ("xyzzy", 2, ""),
        ("", 2, ""),
    ],
)
def test_a_question_names_what_is_near(name: str, n: int, expected: str) -> None:
    known = ["antonym", "LoRA", "choose_first_of_3", "choose_first_of_5", "choose_last_of_3"]
    assert did_you_mean(name, known, n) == expected


def test_names_that_differ_in_case_only_count_once() -> None:
    assert nearest("site", ["SITE", "Site"]) == ["SITE"]
    assert nearest(3, [30, 300]) == ["30"]
