"""Built-in tasks: generated tasks, made from word lists, and knowledge tasks, read from tables.

Names and formats are those of the Function Vectors tasks; the items are this library's own. `pairs` gives a task as a
list of `(input, output, further accepted outputs)` in a fixed order, the same on every machine; `BuiltIn.load` shuffles
and splits it.
"""

import csv
import random
import string
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from importlib.resources import files
from itertools import chain, islice, pairwise, zip_longest
from typing import Literal

from sitelens.tasks.examples import Example
from sitelens.tasks.function_vectors import is_about_case
from sitelens.tasks.suite import Suite
from sitelens.tasks.task import Task

Pair = tuple[str, str, tuple[str, ...]]
Maker = Callable[[random.Random], list[Pair]]

SIZE = 1000
"""Items in every generated task."""


def _data(path: str) -> str:
    return (files("sitelens.tasks") / "data" / path).read_text(encoding="utf-8")


@cache
def _words(category: str) -> tuple[str, ...]:
    return tuple(_data(f"words/{category}.txt").split())


# Tasks whose answer is one of the words in the input


def _take(rng: random.Random, draw: Callable[[random.Random], tuple[list[str], str]]) -> list[Pair]:
    """Pairs from repeated draws of `(words, answer)`, until there are SIZE different inputs."""
    answers: dict[str, str] = {}
    while len(answers) < SIZE:
        words, answer = draw(rng)
        answers[", ".join(words)] = answer
    return [(text, answer, ()) for text, answer in answers.items()]


def _choose(rng: random.Random, size: int, pick: Callable[[list[str]], str]) -> tuple[list[str], str]:
    words = rng.sample(_words("common"), size)
    return words, pick(words)


def _odd_one_out(rng: random.Random, size: int, one: str, others: str) -> tuple[list[str], str]:
    words = rng.sample(_words(others), size - 1)
    answer = rng.choice(_words(one))
    words.insert(rng.randrange(size), answer)
    return words, answer


_CHOICES: dict[str, tuple[str, Callable[[list[str]], str]]] = {
    "choose_first_of": ("The first of {} words.", lambda words: words[0]),
    "choose_middle_of": ("The middle one of {} words.", lambda words: words[len(words) // 2]),
    "choose_last_of": ("The last of {} words.", lambda words: words[-1]),
    "alphabetically_first": ("Of {} words, the one first in the alphabet.", min),
    "alphabetically_last": ("Of {} words, the one last in the alphabet.", max),
}

_CONTRASTS = (
    ("adjective", "verb"),
    ("verb", "adjective"),
    ("animal", "object"),
    ("color", "animal"),
    ("fruit", "animal"),
    ("concept", "object"),
    ("object", "concept"),
)

_EXTRACTIVE: dict[str, tuple[str, Maker]] = {
    f"{stem}_{size}": (text.format(size), partial(_take, draw=partial(_choose, size=size, pick=pick)))
    for stem, (text, pick) in _CHOICES.items()
    for size in (3, 5)
} | {
    f"{one}_v_{other}_{size}": (
        f"The {one} among {size - 1} {other}s.",
        partial(_take, draw=partial(_odd_one_out, size=size, one=f"{one}s", others=f"{other}s")),
    )
    for one, other in _CONTRASTS
    for size in (3, 5)
}


# Tasks on the letters of one word


def _spell(rng: random.Random, read: Callable[[str], str], upper: bool = False) -> list[Pair]:
    words = rng.sample(_words("common"), SIZE)
    return [(word.upper() if upper else word, read(word), ()) for word in words]


def _next_capital(word: str) -> str:
    capitals = string.ascii_uppercase
    return capitals[(capitals.index(word[0].upper()) + 1) % len(capitals)]


# Tasks on the steps of well-known sequences

_UNITS, _UNITH, _TENS, _DAYS, _MONTHS = map(
    str.split,
    (
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
        "sixteen seventeen eighteen nineteen",
        "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth "
        "fourteenth fifteenth sixteenth seventeenth eighteenth nineteenth",
        "twenty thirty forty fifty sixty seventy eighty ninety",
        "monday tuesday wednesday thursday friday saturday sunday monday",
        "january february march april may june july august september october november december january",
    ),
)
_ROMAN = tuple(
    zip(
        ("M", "CM", "D", "CD", "C", "XC", "L", "XL", "X", "IX", "V", "IV", "I"),
        (1000, 900, 500, 400, 100, 90, 50, 40, 10, 9, 5, 4, 1),
        strict=True,
    )
)


def _roman(number: int) -> str:
    text = ""
    for letters, value in _ROMAN:
        count, number = divmod(number, value)
        text += letters * count
    return text


def _ordinal(number: int) -> str:
    teens = 10 < number % 100 < 20
    return f"{number}{'th' if teens else {1: 'st', 2: 'nd', 3: 'rd'}.get(number % 10, 'th')}"


def _sequences() -> Iterator[Sequence[str]]:
    """Ordered sequences: numbers in several notations, days, months, letters. Days and months are cyclic."""
    cardinals, ordinals = _UNITS.copy(), _UNITH.copy()
    for ten in _TENS:
        cardinals += [ten, *(f"{ten}-{unit}" for unit in _UNITS[1:10])]
        ordinals += [f"{ten[:-1]}ieth", *(f"{ten}-{unit}" for unit in _UNITH[:9])]
    for named in (cardinals, ordinals, _DAYS, _MONTHS):
        yield from (named, [name.capitalize() for name in named])
    for alphabet in (string.ascii_lowercase, string.ascii_uppercase):
        yield from (alphabet, [letter * 2 for letter in alphabet])
    for write, start in ((str, 0), (_ordinal, 1), (_roman, 1)):
        yield [write(number) for number in range(start, 2001)]


def _neighbors(_rng: random.Random, forward: bool) -> list[Pair]:
    """Pairs of neighbors, from each sequence in turn, without items that occur in two sequences (I, C, XX)."""
    sequences = list(_sequences())
    places = Counter(chain.from_iterable(map(set, sequences)))
    steps = (((a, b) if forward else (b, a) for a, b in pairwise(items)) for items in sequences)
    columns = ([(item, answer, ()) for item, answer in column if places[item] == 1] for column in steps)
    return list(islice(filter(None, chain.from_iterable(zip_longest(*columns))), SIZE))


_ABSTRACTIVE: dict[str, tuple[str, Maker]] = {
    "capitalize": ("A word with a capital first letter.", partial(_spell, read=str.capitalize)),
    "capitalize_first_letter": (
        "A word's first letter, as a capital.",
        partial(_spell, read=lambda word: word[0].upper()),
    ),
    "capitalize_second_letter": (
        "A word's second letter, as a capital.",
        partial(_spell, read=lambda word: word[1].upper()),
    ),
    "capitalize_last_letter": (
        "A word's last letter, as a capital.",
        partial(_spell, read=lambda word: word[-1].upper()),
    ),
    "lowercase_first_letter": (
        "The first letter of a word in capitals, as a small letter.",
        partial(_spell, read=lambda word: word[0], upper=True),
    ),
    "lowercase_last_letter": (
        "The last letter of a word in capitals, as a small letter.",
        partial(_spell, read=lambda word: word[-1], upper=True),
    ),
    "next_capital_letter": (
        "The letter after a word's first letter, as a capital (A after z).",
        partial(_spell, read=_next_capital),
    ),
    "word_length": ("The number of letters in a word.", partial(_spell, read=lambda word: str(len(word)))),
    "next_item": ("What comes next after a number, letter, day or month.", partial(_neighbors, forward=True)),
    "prev_item": ("What comes before a number, letter, day or month.", partial(_neighbors, forward=False)),
}

GENERATED: dict[str, tuple[str, Maker]] = _EXTRACTIVE | _ABSTRACTIVE
"""Generated tasks: a one-line description and what makes the pairs from a random generator."""

KNOWLEDGE: dict[str, str] = {
    "antonym": "A word with the opposite meaning.",
    "synonym": "A word with the same meaning.",
    "present-past": "The past tense of a verb.",
    "singular-plural": "The plural of a noun.",
    "english-french": "An English word in French.",
    "english-german": "An English word in German.",
    "english-spanish": "An English word in Spanish.",
    "country-capital": "The capital of a country.",
    "country-currency": "The currency of a country.",
    "landmark-country": "The country a landmark is in.",
    "product-company": "The company that makes a product.",
    "person-sport": "The sport an athlete is known for.",
    "person-instrument": "The instrument a musician is known for.",
    "person-occupation": "What a person is known for being.",
}
"""Knowledge tasks: a one-line description. Their pairs lie in `data/<name>.csv`."""


def _known(name: str) -> str:
    if name in GENERATED or name in KNOWLEDGE:
        return name
    raise ValueError(f"no built-in task is called {name!r}; names() lists them")


def names() -> list[str]:
    """The names of all built-in tasks, sorted."""
    return sorted([*GENERATED, *KNOWLEDGE])


def describe(name: str) -> str:
    """A one-line description of the output of a task."""
    return GENERATED[name][0] if name in GENERATED else KNOWLEDGE[_known(name)]


def kind(name: str) -> Literal["extractive", "abstractive"]:
    """Either "extractive" (the answer is always one of the words in the input) or "abstractive"."""
    return "extractive" if _known(name) in _EXTRACTIVE else "abstractive"


def pairs(name: str) -> list[Pair]:
    """The items of a task as `(input, output, further accepted outputs)`, in a fixed order."""
    return list(_pairs(_known(name)))


@cache
def _pairs(name: str) -> tuple[Pair, ...]:
    if name in GENERATED:
        return tuple(GENERATED[name][1](random.Random(f"sitelens:{name}")))
    rows = csv.DictReader(_data(f"{name}.csv").splitlines())
    return tuple((row["input"], row["output"], tuple(filter(None, (row.get("also") or "").split("|")))) for row in rows)


def split_sizes(name: str, n: int) -> tuple[int, int, int]:
    """The numbers of train, valid and test items among n: 70/9/21% (generated tasks) or 50/15/35% (knowledge tasks)."""
    percent = (70, 9) if _known(name) in GENERATED else (50, 15)
    train, valid = ((n * share + 50) // 100 for share in percent)
    return train, valid, n - train - valid


class BuiltIn(Suite):
    """The suite of built-in tasks, which need no download."""

    name = "builtin"
    source = "built in"

    def names(self) -> list[str]:
        """The names of all built-in tasks, sorted."""
        return names()

    def load(self, name: str) -> Task:
        """A task with its items shuffled and split."""
        examples = [Example(*pair) for pair in pairs(name)]
        random.Random(f"sitelens/split/{name}").shuffle(examples)
        n_train, n_valid, _ = split_sizes(name, len(examples))
        parts = examples[:n_train], examples[n_train : n_train + n_valid], examples[n_train + n_valid :]
        train, valid, test = (tuple(part) for part in parts)
        return Task(name, self.source, train, valid, test, case_sensitive=is_about_case(name))

    def describe(self, name: str) -> str:
        """A one-line description of the output of a task."""
        return describe(name)

    def group(self, name: str) -> str:
        """Either "extractive" or "abstractive"."""
        return kind(name)

    def n_items(self, name: str) -> int:
        """The number of items of a task."""
        return len(pairs(name))
