"""The built-in tasks: counts, answers verified independently of the code that generates them, and a pinned hash."""

import csv
import hashlib
import json
import re
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest

from sitelens.tasks import builtin

DATA = Path(builtin.__file__).parent / "data"
CATEGORIES = {
    "animals": 150,
    "fruits": 60,
    "objects": 200,
    "colors": 45,
    "adjectives": 250,
    "verbs": 250,
    "concepts": 150,
}
LISTS = {path.stem: path.read_text(encoding="utf-8").splitlines() for path in (DATA / "words").glob("*.txt")}
EXTRACTIVE = sorted(name for name in builtin.GENERATED if re.search(r"_[35]$", name))
CONTRASTS = [name for name in EXTRACTIVE if "_v_" in name]

HASHES = {
    "adjective_v_verb_3": "d52fcc114bfd",
    "adjective_v_verb_5": "71629e67406d",
    "alphabetically_first_3": "f6841277d328",
    "alphabetically_first_5": "4d7090b95748",
    "alphabetically_last_3": "b493218c4ea5",
    "alphabetically_last_5": "66ad48b53b5c",
    "animal_v_object_3": "b64e92a41e1f",
    "animal_v_object_5": "c919eec54e7f",
    "capitalize": "7fd073413cc7",
    "capitalize_first_letter": "8453e85d1590",
    "capitalize_last_letter": "42365033cc67",
    "capitalize_second_letter": "7862cc44e7a7",
    "choose_first_of_3": "6cb532c36a10",
    "choose_first_of_5": "3e58fb8addb5",
    "choose_last_of_3": "708946c6cd2e",
    "choose_last_of_5": "4c8e6bc81f9e",
    "choose_middle_of_3": "d0eb471d54c6",
    "choose_middle_of_5": "544fbc134a28",
    "color_v_animal_3": "1838ed7e0d9c",
    "color_v_animal_5": "cc7752820014",
    "concept_v_object_3": "35c3d12c25fb",
    "concept_v_object_5": "b67a0cce33e9",
    "fruit_v_animal_3": "9d1a5dc8854e",
    "fruit_v_animal_5": "1ee608bd115f",
    "lowercase_first_letter": "17902042c70b",
    "lowercase_last_letter": "917cc2934286",
    "next_capital_letter": "32a709daad8f",
    "next_item": "8d6840409e01",
    "object_v_concept_3": "4ec2dc4448bd",
    "object_v_concept_5": "7aeedc16c8b6",
    "prev_item": "242765fef7cd",
    "verb_v_adjective_3": "b26e47225161",
    "verb_v_adjective_5": "6739975a3584",
    "word_length": "59597e7cff04",
}


def words_of(text: str) -> list[str]:
    return text.split(", ")


# The word lists


def test_word_lists_are_sorted_unique_small_letters():
    assert set(LISTS) == {*CATEGORIES, "common"}
    for name, words in LISTS.items():
        assert words == sorted(set(words)), name
        assert all(re.fullmatch("[a-z]{2,}", word) for word in words), name


def test_word_lists_are_big_enough():
    assert {name: size for name, size in CATEGORIES.items() if len(LISTS[name]) < size} == {}
    assert len(LISTS["common"]) >= 1100
    assert {len(word) for word in LISTS["common"]} == set(range(3, 11))


def test_no_word_is_in_two_categories():
    for one, other in combinations(CATEGORIES, 2):
        assert set(LISTS[one]) & set(LISTS[other]) == set(), (one, other)


# Generated tasks


def test_the_tasks_are_those_of_the_suite():
    sizes = [f"{stem}_{size}" for stem in builtin._CHOICES for size in (3, 5)]
    assert len(sizes) == 10 and len(CONTRASTS) == 14
    assert set(builtin.GENERATED) == {
        *sizes,
        *CONTRASTS,
        "capitalize",
        "capitalize_first_letter",
        "capitalize_second_letter",
        "capitalize_last_letter",
        "lowercase_first_letter",
        "lowercase_last_letter",
        "next_capital_letter",
        "word_length",
        "next_item",
        "prev_item",
    }
    assert len(builtin.KNOWLEDGE) == 14
    assert builtin.names() == sorted({*builtin.GENERATED, *builtin.KNOWLEDGE})


@pytest.mark.parametrize("name", builtin.GENERATED)
def test_a_thousand_inputs_with_one_answer_each(name: str):
    pairs = builtin.pairs(name)
    assert len(pairs) == 1000
    assert len({text for text, _, _ in pairs}) == 1000
    assert all(text and output and also == () for text, output, also in pairs)
    assert all(text == text.strip() and output == output.strip() for text, output, _ in pairs)


@pytest.mark.parametrize("name", builtin.GENERATED)
def test_pairs_are_the_same_everywhere(name: str):
    text = json.dumps(builtin.pairs(name), separators=(",", ":"))
    assert hashlib.sha256(text.encode()).hexdigest()[:12] == HASHES[name]


def test_a_caller_cannot_spoil_the_pairs():
    builtin.pairs("capitalize").clear()
    assert len(builtin.pairs("capitalize")) == 1000


@pytest.mark.parametrize("name", EXTRACTIVE)
def test_extractive_inputs_are_lists_of_different_words(name: str):
    for text, output, _ in builtin.pairs(name):
        words = words_of(text)
        assert len(words) == len(set(words)) == int(name[-1])
        assert output in words
        assert all(re.fullmatch("[a-z]+", word) for word in words)


@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_choose(place: str, size: int):
    index = {"first": 0, "middle": {3: 1, 5: 2}[size], "last": size - 1}[place]
    for text, output, _ in builtin.pairs(f"choose_{place}_of_{size}"):
        assert words_of(text).index(output) == index


@pytest.mark.parametrize("size", [3, 5])
def test_alphabetically(size: int):
    for text, output, _ in builtin.pairs(f"alphabetically_first_{size}"):
        assert all([*map(ord, output)] <= [*map(ord, word)] for word in words_of(text))
    for text, output, _ in builtin.pairs(f"alphabetically_last_{size}"):
        assert all([*map(ord, output)] >= [*map(ord, word)] for word in words_of(text))


@pytest.mark.parametrize("name", CONTRASTS)
def test_one_word_of_the_first_category_among_others_of_the_second(name: str):
    found = re.fullmatch(r"(\w+)_v_(\w+)_\d", name)
    assert found
    one, others = (set(LISTS[f"{category}s"]) for category in found.groups())
    for text, output, _ in builtin.pairs(name):
        assert [word for word in words_of(text) if word in one] == [output]
        assert sum(word in others for word in words_of(text)) == int(name[-1]) - 1


@pytest.mark.parametrize("name", [name for name in EXTRACTIVE if not name.startswith("choose")])
def test_the_answer_is_equally_often_at_every_place(name: str):
    places = Counter(words_of(text).index(output) for text, output, _ in builtin.pairs(name))
    size = int(name[-1])
    expected, spread = 1000 / size, (1000 * (size - 1)) ** 0.5 / size
    assert set(places) == set(range(size))
    assert all(abs(count - expected) < 4 * spread for count in places.values())


def test_letter_tasks():
    lower, upper = "abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    to_upper, after = dict(zip(lower, upper, strict=True)), dict(zip(lower, upper[1:] + "A", strict=True))
    to_lower = {big: small for small, big in to_upper.items()}
    check = {
        "capitalize": lambda word: "".join([to_upper[word[0]], *word[1:]]),
        "capitalize_first_letter": lambda word: to_upper[next(iter(word))],
        "capitalize_second_letter": lambda word: to_upper[re.sub("^.(.).*", r"\1", word)],
        "capitalize_last_letter": lambda word: to_upper[next(reversed(word))],
        "lowercase_first_letter": lambda word: to_lower[next(iter(word))],
        "lowercase_last_letter": lambda word: to_lower[next(reversed(word))],
        "next_capital_letter": lambda word: after[next(iter(word))],
        "word_length": lambda word: f"{sum(1 for _ in word)}",
    }
    for name, read in check.items():
        letters = upper if name.startswith("lowercase") else lower
        for text, output, _ in builtin.pairs(name):
            assert len(text) >= 2 and set(text) <= set(letters), (name, text)
            assert output == read(text), (name, text)


ONES, TEENS, TENS = map(
    str.split,
    (
        "one two three four five six seven eight nine",
        "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen",
        "twenty thirty forty fifty sixty seventy eighty ninety",
    ),
)
ORDINAL_ENDS = {
    "first": "one",
    "second": "two",
    "third": "three",
    "fifth": "five",
    "eighth": "eight",
    "ninth": "nine",
    "twelfth": "twelve",
}
CALENDAR = (
    " monday tuesday wednesday thursday friday saturday sunday monday / "
    "january february march april may june july august september october november december january "
)


def number_of(word: str) -> int | None:
    """The value of a cardinal number word; None for other words."""
    tens, _, ones = word.partition("-")
    if tens in TENS:
        value = 20 + 10 * TENS.index(tens)
        return value + 1 + ONES.index(ones) if ones in ONES else None if ones else value
    return ["zero", *ONES, *TEENS].index(word) if word in ["zero", *ONES, *TEENS] else None


def cardinal_of(word: str) -> str:
    """The cardinal number word for an ordinal number word; other words unchanged."""
    head, dash, end = word.rpartition("-")
    if end in ORDINAL_ENDS:
        end = ORDINAL_ENDS[end]
    elif end.endswith("ieth"):
        end = end.removesuffix("ieth") + "y"
    else:
        end = end.removesuffix("th")
    return head + dash + end


def roman_value(text: str) -> int:
    values = ["IVXLCDM".index(letter) for letter in text]
    worth = [10 ** (v // 2) * (1 + 4 * (v % 2)) for v in values]
    return sum(-a if a < b else a for a, b in zip(worth, [*worth[1:], 0], strict=True))


def reading(text: str) -> tuple[str, int] | None:
    """The sequence that a number, numeral or letter belongs to, and its position there."""
    if text.isdigit():
        return "numeral", int(text)
    if found := re.fullmatch(r"(\d+)(st|nd|rd|th)", text):
        number = int(found[1])
        ending = "th" if number // 10 % 10 == 1 else {"1": "st", "2": "nd", "3": "rd"}.get(text[-3], "th")
        assert found[2] == ending, text
        return "ordinal numeral", number
    case = "title" if text.istitle() or re.fullmatch("[A-Z][a-z-]+", text) else "lower"
    word = text.lower()
    if len(text) > 2 and number_of(word) is not None:
        return f"{case} cardinal", number_of(word) or 0
    if len(text) > 2 and number_of(cardinal_of(word)) is not None:
        return f"{case} ordinal", number_of(cardinal_of(word)) or 0
    return None


def is_step(one: str, two: str) -> bool:
    """Whether `two` directly follows `one`."""
    if f" {one.lower()} {two.lower()} " in CALENDAR:
        return one.istitle() == two.istitle()
    first, second = reading(one), reading(two)
    if first and second:
        return first[0] == second[0] and second[1] == first[1] + 1
    roman = set(one + two) <= set("IVXLCDM")
    if roman and roman_value(two) == roman_value(one) + 1:
        return True
    letters = len(one) == len(two) <= 2 and len(set(one)) == len(set(two)) == 1
    return letters and one.isupper() == two.isupper() and ord(two[0]) == ord(one[0]) + 1


def test_next_and_prev_item():
    assert all(is_step(text, output) for text, output, _ in builtin.pairs("next_item"))
    assert all(is_step(output, text) for text, output, _ in builtin.pairs("prev_item"))
    assert not is_step("one", "two-three") and not is_step("B", "D") and not is_step("IX", "XI")


@pytest.mark.parametrize("name", ["next_item", "prev_item"])
def test_items_that_could_be_letters_or_roman_numerals_are_left_out(name: str):
    inputs = {text for text, _, _ in builtin.pairs(name)}
    assert not inputs & {*"IVXLCDM", "II", "XX", "CC", "MM"}
    assert {"b", "B", "bb", "BB", "III", "7", "7th", "seven", "Seven", "seventh", "may", "May"} <= inputs


# Describing and splitting


def test_describe_and_kind():
    for name in builtin.names():
        text = builtin.describe(name)
        assert text.endswith(".") and "\n" not in text
        assert builtin.kind(name) == ("extractive" if name in EXTRACTIVE else "abstractive")


@pytest.mark.parametrize("ask", [builtin.describe, builtin.kind, builtin.pairs, lambda n: builtin.split_sizes(n, 9)])
def test_an_unknown_name_is_refused(ask):
    with pytest.raises(ValueError, match="capitalise"):
        ask("capitalise")


def test_split_sizes():
    assert builtin.split_sizes("capitalize", 1000) == (700, 90, 210)
    assert builtin.split_sizes("antonym", 200) == (100, 30, 70)
    for name in ("capitalize", "antonym"):
        for n in range(400):
            sizes = builtin.split_sizes(name, n)
            assert sum(sizes) == n and min(sizes) >= 0


# Knowledge tasks, read from tables

TABLES = sorted(DATA.glob("*.csv"))


@pytest.mark.parametrize("table", TABLES, ids=lambda path: path.stem)
def test_knowledge_table(table: Path):
    assert table.stem in builtin.KNOWLEDGE
    with table.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, restval="", strict=True)
        rows = list(reader)
    assert reader.fieldnames in (["input", "output"], ["input", "output", "also"])
    assert len(rows) >= 120
    assert [text for text, count in Counter(row["input"] for row in rows).items() if count > 1] == []
    for row in rows:
        assert None not in row, row
        also = row["also"].split("|") if row.get("also") else []
        fields = [row["input"], row["output"], *also]
        assert all(fields) and fields == [field.strip() for field in fields], row
        assert row["output"] not in also and len(also) == len(set(also)), row


@pytest.mark.parametrize("name", [table.stem for table in TABLES])
def test_knowledge_pairs_are_the_rows_of_the_table(name: str):
    pairs = builtin.pairs(name)
    with (DATA / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))[1:]
    assert [[text, output, *also] for text, output, also in pairs] == [
        [*row[:2], *(row[2].split("|") if row[2:] and row[2] else [])] for row in rows
    ]
