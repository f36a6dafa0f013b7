"""Benchmarks: the real files parsed independently, official and seeded splits, the hub, and bad input."""

from __future__ import annotations

import contextlib
import errno
import json
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pooch
import pytest

from sitelens.errors import SitelensError, SitelensWarning
from sitelens.files import folders
from sitelens.settings import settings
from sitelens.tasks import (
    QA_TEMPLATE,
    SPLITS,
    Example,
    Task,
    benchmarks,
    builtin,
    function_vectors_split,
    group_of,
    list_tasks,
    load_task,
    rows,
    suite_names,
    task_names,
)

ROUNDS = {"r1": 1000, "r2": 1000, "r3": 1198}  # development sets
CATEGORIES = {
    "biology": 717, "business": 789, "chemistry": 1132, "computer-science": 410, "economics": 844, "engineering": 969,
    "health": 818, "history": 381, "law": 1101, "math": 1351, "other": 924, "philosophy": 499, "physics": 1299,
    "psychology": 798,
}  # fmt: skip
DIGESTS = {
    "anli/r1": "e45a5c086930",
    "mmlu-pro/law": "8325a5635208",
    "bbh/movie_recommendation": "7b64c7ec85bc",
}
LABELS = ["entailment", "neutral", "contradiction"]


@pytest.fixture(autouse=True)
def nothing_remembered() -> None:
    """Rows of another test's files or hub are forgotten."""
    rows._loaded.cache_clear()
    rows._parsed.cache_clear()


@pytest.fixture
def unpinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """No checksums: any file content is accepted."""
    monkeypatch.setattr(benchmarks, "_pins", dict)


@pytest.fixture
def no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """No local data folder is set."""
    monkeypatch.delenv("SITELENS_DATA", raising=False)


def written(path: Path, content: Any) -> Path:
    """The path of a new file with bytes, text, or JSON Lines (from a list)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def inferences(n: int, split: str = "dev", **changed: Any) -> list[dict[str, Any]]:
    """`n` rows in the format of ANLI."""
    return [
        {"uid": f"{i}", "premise": f"Premise {i} of {split}. ", "hypothesis": f" Guess {i}.", "label": i % 3, **changed}
        for i in range(n)
    ]


def questions(n: int, category: str = "law", **changed: Any) -> list[dict[str, Any]]:
    """`n` rows in the format of MMLU-Pro, with three to five options."""
    return [
        {"question": f"{category} {i}?", "options": [f" option {j}" for j in range(3 + i % 3)], "answer": "ABC"[i % 3],
         "category": category, **changed}
        for i in range(n)
    ]  # fmt: skip


def sizes(task: Task) -> tuple[int, ...]:
    return tuple(len(task.split(split)) for split in SPLITS)


def items(task: Task) -> list[Example]:
    return [item for split in SPLITS for item in task.split(split)]


def as_split(examples: list[Example]) -> list[tuple[Example, ...]]:
    """Train, valid and test items, by the published split of all items in order."""
    parts = function_vectors_split(len(examples))
    assert sorted(index for part in parts for index in part) == list(range(len(examples)))
    return [tuple(examples[i] for i in part) for part in parts]


def lines(path: Path) -> list[dict[str, Any]]:
    with open(path, encoding="utf-8", newline="\n") as file:
        return [json.loads(line) for line in file]


# The real files


@pytest.mark.parametrize("name", ROUNDS)
def test_a_round_of_anli_is_its_development_set(data_folder: Path, name: str):
    expected = [
        Example("\n".join([row["premise"].strip(), "Hypothesis: " + row["hypothesis"].strip()]), LABELS[row["label"]])
        for row in lines(data_folder / "anli" / f"dev_{name}.jsonl")
    ]
    with settings.using(data_dir=data_folder):
        task = load_task(f"anli/{name}")
    assert len(expected) == sum(sizes(task)) == ROUNDS[name]
    assert [task.train, task.valid, task.test] == as_split(expected)
    assert (task.source, task.published_metric, task.template) == ("facebook/anli", "exact_match", QA_TEMPLATE)
    premises = {item.input.split("\nHypothesis: ")[0] for item in task.train}
    count = sum(item.input.split("\nHypothesis: ")[0] in premises for item in task.test)
    shared = f"{count} of {len(task.test)} test items have a premise that also stands in train"
    assert count and task.note == f"70/9/21 of dev_{name} (seed 32); {shared}"


def test_mmlu_pro_is_its_test_split_by_category(data_folder: Path):
    raw = lines(data_folder / "mmlu_pro" / "test.jsonl")
    with settings.using(data_dir=data_folder):
        tasks = {name: load_task(f"mmlu-pro/{name}") for name in CATEGORIES}
    assert {name: sum(sizes(task)) for name, task in tasks.items()} == CATEGORIES
    assert sum(CATEGORIES.values()) == len(raw) == 12032
    for name, task in tasks.items():
        expected = [row for row in raw if row["category"].replace(" ", "-") == name]
        for row, item in zip(expected, sorted_as_upstream(task), strict=True):
            question, options = row["question"].strip(), [option.strip() for option in row["options"]]
            assert item.input.startswith(f"{question}\nA. {options[0]}")
            assert item.input.endswith(f"\n{chr(64 + len(options))}. {options[-1]}")
            assert f"\n{item.output}. {options[row['answer_index']]}" in item.input
            assert item.output == row["answer"] and item.also == ()
        assert task.source == "TIGER-Lab/MMLU-Pro" and task.published_metric == "exact_match"


def sorted_as_upstream(task: Task) -> list[Example]:
    """The items of a seeded split in their original order."""
    order = [index for part in function_vectors_split(sum(sizes(task))) for index in part]
    return [item for _, item in sorted(zip(order, items(task), strict=True), key=lambda pair: pair[0])]


def test_a_question_reads_as_it_should(data_folder: Path):
    with settings.using(data_dir=data_folder):
        [item] = [one for one in items(load_task("mmlu-pro/chemistry")) if "negative end of the bond" in one.input]
    question = "In which of the following is the negative end of the bond written last?"
    assert item == Example(f"{question}\nA. H—O\nB. P—Cl", "B")


def test_inputs_that_stand_in_train_and_test_are_noted(data_folder: Path):
    with settings.using(data_dir=data_folder):
        task = load_task("mmlu-pro/health")
    shared = {item.input for item in task.train} & {item.input for item in task.test}
    assert shared and task.note == f"70/9/21 of test (seed 32); {len(shared)} inputs of train also stand in test"


def test_every_local_task_of_bbh_is_upstreams_without_parentheses(data_folder: Path):
    names = [path.stem for path in (data_folder / "bbh").glob("*.json") if path.stem != "registry"]
    assert len(names) >= 24
    odd = {}
    for name in names:
        raw = json.loads((data_folder / "bbh" / f"{name}.json").read_text("utf-8"))
        assert "canary" in raw
        with settings.using(data_dir=data_folder):
            task = load_task(f"bbh/{name}")
        found = sorted_as_upstream(task)
        assert [item.input for item in found] == [row["input"].strip() for row in raw["examples"]]
        lettered = "Options:\n(A)" in found[0].input
        for item, row in zip(found, raw["examples"], strict=True):
            assert item.output and item.output == row["target"].strip("()" if lettered else None)
            if lettered and f"\n({item.output}) " not in item.input:
                odd[name] = item.output
        assert task.note.startswith("70/9/21 of examples (seed 32)") and task.published_metric == "exact_match"
        assert task.source == "suzgunmirac/BIG-Bench-Hard@9ee07bd"
    assert odd == {"movie_recommendation": "Monsters, Inc"}


def test_all_27_tasks_of_bbh_are_known_with_checksum_and_size():
    registry = benchmarks.BBH_FILES.registry
    assert len(registry) == 27 and sum(row["examples"] for row in registry.values()) == 6511
    assert all(re.fullmatch("[0-9a-f]{64}", row["sha256"]) for row in registry.values())


@pytest.mark.parametrize("name", DIGESTS)
def test_a_benchmark_is_the_same_everywhere(data_folder: Path, name: str):
    with settings.using(data_dir=data_folder):
        assert load_task(name).digest[:12] == DIGESTS[name]


@pytest.mark.usefixtures("unpinned")
def test_the_file_of_mmlu_pro_is_parsed_once_and_anew_when_it_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    read: list[str] = []
    parse = rows._json
    monkeypatch.setattr(rows, "_json", lambda line, where: read.append(where) or parse(line, where))
    path = written(tmp_path / "mmlu_pro" / "test.jsonl", questions(20, "law") + questions(30, "math"))
    with settings.using(data_dir=tmp_path):
        assert sum(sizes(load_task("mmlu-pro/law"))) == 20 and sum(sizes(load_task("mmlu-pro/math"))) == 30
        assert len(read) == 50
        written(path, questions(21, "law"))
        assert sum(sizes(load_task("mmlu-pro/law"))) == 21


# Checksums


@pytest.fixture
def copies(data_folder: Path, tmp_path: Path) -> Path:
    """Copies of the real ANLI and MMLU-Pro files, which tests may change."""
    for place in ("anli/dev_r1.jsonl", "mmlu_pro/test.jsonl"):
        (tmp_path / place).parent.mkdir()
        shutil.copy(data_folder / place, tmp_path / place)
        (tmp_path / place).chmod(0o644)
    return tmp_path


@pytest.mark.parametrize("seed", range(12))
def test_a_flipped_bit_of_anli_never_gives_other_items_in_silence(copies: Path, seed: int):
    with settings.using(data_dir=copies):
        task = load_task("anli/r1")
        path, rng = copies / "anli" / "dev_r1.jsonl", random.Random(seed)
        content = bytearray(path.read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(7)
        path.write_bytes(content)
        with contextlib.suppress(SitelensError):
            assert load_task("anli/r1") == task  # the changed bit is in a field that is not used, such as the reason


@pytest.mark.parametrize(
    ("task", "place", "before", "after"),
    [
        ("anli/r1", "anli/dev_r1.jsonl", '"label": 0', '"label": 1'),
        ("anli/r1", "anli/dev_r1.jsonl", " the ", " The "),
        ("mmlu-pro/law", "mmlu_pro/test.jsonl", '"category": "law"', '"category": "lew"'),
    ],
)
def test_other_items_under_an_official_name_are_refused(copies: Path, task: str, place: str, before: str, after: str):
    text = (copies / place).read_text("utf-8")
    assert before in text
    (copies / place).write_text(text.replace(before, after, 1), "utf-8")
    expected = rf"{place} does not hold the items of {task[:4]}"
    with settings.using(data_dir=copies), pytest.raises(SitelensError, match=expected):
        load_task(task)


def test_a_file_that_lacks_items_is_refused_and_another_category_stays_usable(copies: Path):
    path = copies / "mmlu_pro" / "test.jsonl"
    *kept, last = path.read_text("utf-8").splitlines(keepends=True)
    path.write_text("".join(kept), "utf-8")
    slug = json.loads(last)["category"].replace(" ", "-")
    expected = rf"test\.jsonl does not hold the items of mmlu-pro/{slug}: .*expected \d+ items"
    with settings.using(data_dir=copies):
        with pytest.raises(SitelensError, match=expected):
            load_task(f"mmlu-pro/{slug}")
        assert load_task("mmlu-pro/law" if slug != "law" else "mmlu-pro/math").test


def test_the_layout_of_a_line_and_unused_fields_do_not_matter(copies: Path):
    with settings.using(data_dir=copies):
        task, path = load_task("anli/r1"), copies / "anli" / "dev_r1.jsonl"
        written(path, [{**row, "reason": "", "uid": "x"} for row in lines(path)])
        assert load_task("anli/r1") == task


def test_another_content_of_the_hub_is_said(hub: Hub):
    hub["TIGER-Lab/MMLU-Pro", "test"] = questions(40, "law")
    with pytest.warns(SitelensWarning, match="mmlu-pro/law is another on the hub now .*40 items .*expected 1101 items"):
        assert sum(sizes(load_task("mmlu-pro/law"))) == 40


def test_official_splits_without_a_known_checksum_are_held_to_their_first_content(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(benchmarks, "_pins", lambda: {"anli/train_r1": (20, None)})
    with settings.using(data_dir=anli_folder(tmp_path, 20, 2, 5)):
        load_task("anli/r1")
        written(tmp_path / "anli" / "train_r1.jsonl", inferences(20, "another train"))
        with pytest.raises(SitelensError, match=r"train_r1\.jsonl does not hold the items of anli/train_r1"):
            load_task("anli/r1")


def test_a_file_that_cannot_be_read_is_named(copies: Path, monkeypatch: pytest.MonkeyPatch):
    (copies / "anli" / "dev_r1.jsonl").unlink()
    (copies / "anli" / "dev_r1.jsonl").symlink_to(copies / "mmlu_pro" / "test.jsonl")
    monkeypatch.setattr(rows, "read_bytes", unreadable_file)
    expected = r"dev_r1\.jsonl cannot be read: Permission"
    with settings.using(data_dir=copies), pytest.raises(SitelensError, match=expected):
        load_task("anli/r1")


def unreadable_file(path: Path) -> bytes:
    raise folders.unreadable(path, PermissionError(errno.EACCES, "Permission denied"))


# Splits


def anli_folder(folder: Path, train: int, dev: int, test: int) -> Path:
    for split, n in {"train": train, "dev": dev, "test": test}.items():
        written(folder / "anli" / f"{split}_r1.jsonl", inferences(n, split))
    return folder


@pytest.mark.usefixtures("unpinned")
def test_official_splits_are_taken_where_all_three_are_there(tmp_path: Path):
    with settings.using(data_dir=anli_folder(tmp_path, 11, 1, 1)):
        task = load_task("anli/r1")
    assert sizes(task) == (11, 1, 1)
    assert task.train[1] == Example("Premise 1 of train.\nHypothesis: Guess 1.", "neutral")
    assert task.valid == (Example("Premise 0 of dev.\nHypothesis: Guess 0.", "entailment"),)
    assert task.test == (Example("Premise 0 of test.\nHypothesis: Guess 0.", "entailment"),)
    assert task.note == "the official splits train_r1, dev_r1, test_r1"


@pytest.mark.usefixtures("unpinned")
@pytest.mark.parametrize(("train", "test"), [(10, 1), (0, 5), (20, 0)])
def test_official_splits_that_are_too_small_give_way_to_the_development_set(tmp_path: Path, train: int, test: int):
    with settings.using(data_dir=anli_folder(tmp_path, train, 20, test)):
        task = load_task("anli/r1")
    assert sizes(task) == (14, 2, 4) and task.note == "70/9/21 of dev_r1 (seed 32)"
    assert all("of dev" in item.input for item in items(task))


@pytest.mark.usefixtures("unpinned")
def test_a_development_set_without_a_test_set_is_split(tmp_path: Path):
    (anli_folder(tmp_path, 20, 20, 20) / "anli" / "test_r1.jsonl").unlink()
    with settings.using(data_dir=tmp_path):
        assert load_task("anli/r1").note == "70/9/21 of dev_r1 (seed 32)"


@pytest.mark.usefixtures("unpinned")
def test_shared_inputs_of_official_splits_are_noted(tmp_path: Path):
    folder = anli_folder(tmp_path, 20, 2, 5)
    written(folder / "anli" / "test_r1.jsonl", inferences(3, "train") + inferences(3, "test"))
    with settings.using(data_dir=folder):
        note = load_task("anli/r1").note
    assert note.endswith(
        "test_r1; 3 of 6 test items have a premise that also stands in train; 3 inputs of train also stand in test"
    )


@pytest.mark.usefixtures("unpinned")
def test_too_few_items_are_refused(tmp_path: Path):
    written(tmp_path / "anli" / "dev_r1.jsonl", inferences(3))
    with settings.using(data_dir=tmp_path), pytest.raises(SitelensError, match="'anli/r1' has 3 items: at least 4"):
        load_task("anli/r1")


# Downloads


Hub = dict[tuple[str, str], list[dict[str, Any]]]


@pytest.fixture
def hub(no_data: None, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A fake hub that holds the splits that a test adds."""
    there: Hub = {}

    def load(address: str, split: str) -> datasets.Dataset:
        return datasets.Dataset.from_list(there.pop((address, split)))  # loading it twice would be an error

    monkeypatch.setattr(datasets, "load_dataset", load)
    return there


@pytest.mark.usefixtures("unpinned")
def test_anli_of_the_hub_has_its_official_splits_and_equals_the_local_one(hub: Hub, tmp_path: Path):
    for split, n in {"train": 30, "dev": 4, "test": 5}.items():
        hub["facebook/anli", f"{split}_r1"] = inferences(n, split)
    task = load_task("anli/r1")
    assert sizes(task) == (30, 4, 5) and task.note == "the official splits train_r1, dev_r1, test_r1"
    with settings.using(data_dir=anli_folder(tmp_path, 30, 4, 5)):
        assert load_task("anli/r1") == task


@pytest.mark.usefixtures("unpinned")
def test_mmlu_pro_of_the_hub_is_loaded_once_and_equals_the_local_one(hub: Hub, tmp_path: Path):
    content = questions(20, "law") + questions(30, "computer science")
    hub["TIGER-Lab/MMLU-Pro", "test"] = content
    tasks = [load_task("mmlu-pro/law"), load_task("mmlu-pro/computer-science")]
    assert [sum(sizes(task)) for task in tasks] == [20, 30]
    written(tmp_path / "mmlu_pro" / "test.jsonl", content)
    with settings.using(data_dir=tmp_path):
        assert [load_task("mmlu-pro/law"), load_task("mmlu-pro/computer-science")] == tasks


@pytest.mark.usefixtures("unpinned")
def test_a_data_folder_without_the_file_leaves_it_to_the_hub(hub: Hub, tmp_path: Path):
    hub["TIGER-Lab/MMLU-Pro", "test"] = questions(20)
    with settings.using(data_dir=tmp_path):
        assert sum(sizes(load_task("mmlu-pro/law"))) == 20


@pytest.mark.parametrize(
    ("name", "address", "file"),
    [
        ("anli/r2", "facebook/anli", "anli/dev_r2.jsonl (and anli/train_r2.jsonl and anli/test_r2.jsonl"),
        ("mmlu-pro/law", "TIGER-Lab/MMLU-Pro", "mmlu_pro/test.jsonl"),
    ],
)
def test_no_network_says_what_to_do(no_data: None, name: str, address: str, file: str):
    url = f"https://huggingface.co/datasets/{address}"
    expected = f"{re.escape(name)} could not be loaded from {url} .*{re.escape(file)}.*SITELENS_DATA"
    with pytest.raises(SitelensError, match=f"(?s){expected}"):
        load_task(name)  # the tests are offline


@pytest.mark.parametrize("error", [ImportError("No module named 'datasets'"), ValueError('Unknown split "test".')])
def test_whatever_the_hub_says_is_passed_on(no_data: None, monkeypatch: pytest.MonkeyPatch, error: Exception):
    def broken(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", broken)
    with pytest.raises(SitelensError, match=f"mmlu-pro/law could not be loaded .*{re.escape(str(error))}"):
        load_task("mmlu-pro/law")


@pytest.mark.usefixtures("unpinned")
def test_a_changed_schema_of_the_hub_is_named(hub: Hub):
    hub["TIGER-Lab/MMLU-Pro", "test"] = [{"prompt": "?", "category": "law"}] * 5
    with pytest.raises(SitelensError, match=r"TIGER-Lab/MMLU-Pro, test item 1: 'question' must be text"):
        load_task("mmlu-pro/law")


def test_bbh_is_downloaded_from_its_commit_with_its_checksum(
    no_data: None, own_cache: Path, data_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    asked: list[tuple[str, str]] = []

    def retrieve(url: str, known_hash: str, fname: str, path: Path, **_: Any) -> str:
        asked.append((url, known_hash))
        path.mkdir(parents=True)
        return str(shutil.copy(data_folder / "bbh" / "navigate.json", path / fname))

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    with settings.using(data_dir=own_cache.parent):  # a folder without BBH
        downloaded = load_task("bbh/navigate")
    folder = "https://raw.githubusercontent.com/suzgunmirac/BIG-Bench-Hard/9ee07bd481feebf959a6b59d61ea57bdcf30964d/bbh"
    assert asked == [(f"{folder}/navigate.json", benchmarks.BBH_FILES.registry["navigate"]["sha256"])]
    assert list(own_cache.rglob("navigate.json"))
    with settings.using(data_dir=data_folder):
        assert load_task("bbh/navigate") == downloaded


def test_bbh_without_a_network_says_what_to_do(no_data: None, monkeypatch: pytest.MonkeyPatch):
    def offline(*_: object, **__: object) -> str:
        raise OSError("Network is unreachable")

    monkeypatch.setattr(pooch, "retrieve", offline)
    expected = r"bbh/snarks .*snarks\.json: Network is unreachable\. .* as bbh/\*\.json and set SITELENS_DATA to it"
    with pytest.raises(SitelensError, match=expected):
        load_task("bbh/snarks")


# Bad input


def test_a_changed_file_of_bbh_is_refused_by_its_checksum(data_folder: Path, tmp_path: Path):
    content = (data_folder / "bbh" / "snarks.json").read_bytes()
    written(tmp_path / "bbh" / "snarks.json", content.replace(b"(A)", b"(B)", 1))
    expected = r"snarks\.json is not the upstream file of bbh/snarks: SHA-256 [0-9a-f]{64}, expected [0-9a-f]{64}"
    with settings.using(data_dir=tmp_path), pytest.raises(SitelensError, match=expected):
        load_task("bbh/snarks")


def damaged(rows_: list[dict[str, Any]], change: Callable[[dict[str, Any]], Any]) -> list[Any]:
    """The rows with the third row changed."""
    return [*rows_[:2], change(rows_[2]), *rows_[3:]]


@pytest.mark.usefixtures("unpinned")
@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda row: {**row, "premise": " "}, "'premise' must be text that is not empty, not ' '"),
        (lambda row: {**row, "hypothesis": None}, "'hypothesis' must be text that is not empty, not None"),
        (lambda row: {key: row[key] for key in ("uid", "hypothesis", "label")}, "'premise' must be text"),
        (lambda row: {**row, "label": -1}, r"'label' must be 0 \(entailment\), 1 or 2 \(contradiction\), not -1"),
        (lambda row: {**row, "label": "e"}, "'label' must be .*, not 'e'"),
        (lambda row: {**row, "label": 1.0}, "'label' must be .*, not 1.0"),
        (lambda row: {**row, "label": [0]}, "'label' must be"),
        (lambda row: [row], "'premise' must be text"),
        (lambda row: None, "'premise' must be text"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_row_of_anli_that_cannot_be_used_is_named(tmp_path: Path, change: Callable[[dict[str, Any]], Any], why: str):
    written(tmp_path / "anli" / "dev_r1.jsonl", damaged(inferences(5), change))
    with settings.using(data_dir=tmp_path), pytest.raises(SitelensError, match=rf"dev_r1\.jsonl, line 3: {why}"):
        load_task("anli/r1")


@pytest.mark.usefixtures("unpinned")
@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda row: {**row, "question": ""}, "'question' must be text"),
        (lambda row: {**row, "category": 5}, "'category' must be text"),
        (lambda row: {key: row[key] for key in ("question", "options", "category")}, "'answer' must be text"),
        (lambda row: {**row, "options": "A, B"}, "'options' must be a list of texts, not 'A, B'"),
        (lambda row: {**row, "options": [1, 2]}, r"'options' must be a list of texts, not \[1, 2\]"),
        (lambda row: {**row, "options": ["one"] * 27}, "27 options, more than there are letters"),
        (lambda row: {**row, "options": []}, "answer 'C' is none of the options' letters, none"),
        (lambda row: {**row, "answer": "J"}, "answer 'J' is none of the options' letters, ABCDE"),
        (lambda row: {**row, "answer": "AB"}, "answer 'AB' is none of the options' letters"),
        (lambda row: {**row, "answer": "option 0"}, "answer 'option 0' is none of the options' letters"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_row_of_mmlu_pro_that_cannot_be_used_is_named(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], why: str
):
    written(tmp_path / "mmlu_pro" / "test.jsonl", damaged(questions(5), change))
    with settings.using(data_dir=tmp_path), pytest.raises(SitelensError, match=rf"test\.jsonl, line 3: .*{why}"):
        load_task("mmlu-pro/law")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b'{"premise": "cut o', r"dev_r1\.jsonl, line 1 is not JSON"),
        (json.dumps(inferences(1)[0]) + "\n\n<html>\n", r"dev_r1\.jsonl, line 3 is not JSON"),
        (b"\xff\xfe{", r"dev_r1\.jsonl is not UTF-8 text"),
        (b"", "'anli/r1' has 0 items"),
    ],
    ids=["cut off", "another format", "another encoding", "empty"],
)
@pytest.mark.usefixtures("unpinned")
def test_a_damaged_file_is_named(tmp_path: Path, content: str | bytes, why: str):
    written(tmp_path / "anli" / "dev_r1.jsonl", content)
    with settings.using(data_dir=tmp_path), pytest.raises(SitelensError, match=why):
        load_task("anli/r1")


@pytest.mark.usefixtures("unpinned")
def test_line_ends_within_a_text_and_blank_lines_are_no_rows(tmp_path: Path):
    content = [{**row, "premise": "one\u2028two\x85three"} for row in inferences(5)]
    text = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in content)
    written(tmp_path / "anli" / "dev_r1.jsonl", text)
    with settings.using(data_dir=tmp_path):
        assert len(items(load_task("anli/r1"))) == 5


@pytest.mark.parametrize(
    ("content", "known"), [(questions(5, "math") + questions(5, "art"), "art, math"), ([], "none")]
)
def test_a_category_that_the_file_lacks_is_named(tmp_path: Path, content: list[Any], known: str):
    written(tmp_path / "mmlu_pro" / "test.jsonl", content)
    expected = rf"mmlu-pro/computer-science: .*test\.jsonl has no category 'computer science'; there are: {known}$"
    with settings.using(data_dir=tmp_path), pytest.raises(SitelensError, match=expected):
        load_task("mmlu-pro/computer-science")


# Names


SUITES = {"builtin": len(builtin.names()), "fv57": 57, "anli": 3, "mmlu-pro": 14, "bbh": 27}


def test_every_task_stands_in_one_suite():
    names = {suite: suite_names(suite) for suite in SUITES}
    assert {suite: len(set(own)) for suite, own in names.items()} == SUITES
    assert [name for own in names.values() for name in own] == task_names()
    assert names["anli"] == ["anli/r1", "anli/r2", "anli/r3"]
    assert names["mmlu-pro"] == [f"mmlu-pro/{category}" for category in CATEGORIES]
    assert {"bbh/word_sorting", "bbh/web_of_lies"} <= set(names["bbh"])


@pytest.mark.parametrize(
    ("suite", "near"),
    [("fv", "fv57"), ("FV57", "fv57"), ("mmlu", "mmlu-pro"), ("BBH", "bbh"), ("anil", "anli"), ("built-in", "builtin")],
)
def test_an_unknown_suite_is_answered_with_the_nearest(suite: str, near: str):
    known = ", ".join(SUITES)
    with pytest.raises(SitelensError, match=rf"unknown suite '{suite}' \(did you mean {near}\?\); there are: {known}$"):
        suite_names(suite)


def test_a_suite_near_to_nothing_is_answered_with_all():
    with pytest.raises(SitelensError, match=f"unknown suite 'xyzzy'; there are: {', '.join(SUITES)}$"):
        suite_names("xyzzy")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("anli/r4", "anli/r1"),
        ("anli", "anli/r1"),
        ("mmlu-pro/computer science", "mmlu-pro/computer-science"),
        ("mmlu-pro/maths", "mmlu-pro/math"),
        ("bbh/date-understanding", "bbh/date_understanding"),
        ("bbh/snark", "bbh/snarks"),
        ("date_understanding", "bbh/date_understanding"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(name: str, near: str):
    with pytest.raises(SitelensError, match=rf"unknown task '{name}': did you mean .*{near}\b"):
        load_task(name)


def test_groups_are_what_a_table_counts_tasks_to():
    names = ["antonym", "choose_first_of_3", "fv/antonym", "fv/squad_val", "anli/r1", "mmlu-pro/law", "bbh/snarks"]
    groups = ["abstractive", "extractive", "abstractive", "extractive", "ANLI", "MMLU-Pro", "BBH"]
    assert [group_of(name) for name in names] == groups
    assert [group_of(name) for name in ("mine", "fv/mine", "bbh/mine", "anli")] == ["own"] * 4


def test_list_tasks_shows_the_benchmarks():
    frame = list_tasks().set_index("name")
    assert {name: frame.loc[f"mmlu-pro/{name}", "items"] for name in CATEGORIES} == CATEGORIES
    row = frame.loc["bbh/penguins_in_a_table"]
    assert list(row) == ["BBH", 146, "suzgunmirac/BIG-Bench-Hard@9ee07bd", "Suzgun et al. 2022"]


def test_tasks_are_listed_without_datasets_or_torch():
    code = "import sys, sitelens.tasks as t; t.list_tasks(); sys.exit(bool({'datasets', 'torch'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
