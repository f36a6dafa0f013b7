"""Tasks: published splits, checksums, downloads, built-in tasks, users' own tasks, and all kinds of bad input."""

from __future__ import annotations

import csv
import gc
import hashlib
import http.server
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pooch
import pytest
import requests

from sitelens.errors import SitelensError, SitelensWarning
from sitelens.settings import settings
from sitelens.tasks import (
    QA_TEMPLATE,
    SPLITS,
    Example,
    Task,
    builtin,
    check_template,
    function_vectors,
    function_vectors_split,
    list_tasks,
    load_task,
    load_tasks,
    task_names,
)

# Train / valid / test of the 57 tasks, as published.
SIZES = """
adjective_v_verb_3 700/90/210; adjective_v_verb_5 700/90/210; ag_news 5320/684/1596; alphabetically_first_3 700/90/210;
alphabetically_first_5 700/90/210; alphabetically_last_3 700/90/210; alphabetically_last_5 700/90/210;
animal_v_object_3 700/90/210; animal_v_object_5 700/90/210; antonym 1678/216/504; capitalize 569/74/170;
capitalize_first_letter 569/74/170; capitalize_last_letter 569/74/171; capitalize_second_letter 550/72/165;
choose_first_of_3 700/90/210; choose_first_of_5 700/90/210; choose_last_of_3 700/90/210; choose_last_of_5 700/90/210;
choose_middle_of_3 700/90/210; choose_middle_of_5 700/90/210; color_v_animal_3 700/90/210; color_v_animal_5 700/90/210;
commonsense_qa 7673/987/2302; concept_v_object_3 700/90/210; concept_v_object_5 700/90/210;
conll2003_location 3149/405/945; conll2003_organization 2690/346/807; conll2003_person 2480/320/744;
country-capital 137/18/42; country-currency 137/18/42; english-french 3288/423/987; english-german 3601/464/1080;
english-spanish 3639/468/1092; fruit_v_animal_3 700/90/210; fruit_v_animal_5 700/90/210; landmark-country 585/76/175;
lowercase_first_letter 569/74/171; lowercase_last_letter 569/74/171; national_parks 315/41/95;
next_capital_letter 569/74/171; next_item 157/21/47; object_v_concept_3 700/90/210; object_v_concept_5 700/90/210;
park-country 524/68/157; person-instrument 357/46/107; person-occupation 574/75/172; person-sport 222/29/67;
present-past 205/27/61; prev_item 157/21/47; product-company 365/48/109; sentiment 816/106/245;
singular-plural 143/19/43; squad_val 3460/446/1038; synonym 2016/260/604; verb_v_adjective_3 700/90/210;
verb_v_adjective_5 700/90/210; word_length 569/74/171
"""
PUBLISHED = {
    name: tuple(map(int, sizes.split("/"))) for name, sizes in (entry.split() for entry in SIZES.strip().split(";"))
}
DIGESTS = {
    "capitalize": "b90a3d00b18d",
    "choose_first_of_3": "dd68cd366520",
    "next_item": "7f54ee8b0f34",
    "country-capital": "2bf3d6fc9505",
}
PAIRS = [("hot", "cold"), ("big", "small"), ("up", "down"), ("in", "out")]
LISTED = [{"input": source, "output": output} for source, output in PAIRS]


def sizes(task: Task) -> tuple[int, int, int]:
    return len(task.train), len(task.valid), len(task.test)


def items(task: Task) -> set[Example]:
    return {*task.train, *task.valid, *task.test}


def written(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, bytes):
        content = (content if isinstance(content, str) else json.dumps(content)).encode()
    path.write_bytes(content)
    return path


# The published split


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_split_has_the_published_sizes(name: str):
    train, valid, test = function_vectors_split(sum(PUBLISHED[name]))
    assert (len(train), len(valid), len(test)) == PUBLISHED[name]
    assert sorted(train + valid + test) == list(range(sum(PUBLISHED[name])))


@pytest.mark.parametrize("n", [4, 5, 10, 197, 813, 1000, 10962])
def test_the_split_is_that_of_scikit_learn(n: int):
    split = pytest.importorskip("sklearn.model_selection").train_test_split
    train, rest = split(list(range(n)), test_size=0.3, random_state=32)
    test, valid = split(rest, test_size=0.3, random_state=32)
    assert function_vectors_split(n) == (train, valid, test)


def test_all_57_tasks_are_known_with_checksum_and_size_but_one():
    registry = function_vectors.FILES.registry
    assert set(registry) == set(PUBLISHED) and len(registry) == 57
    for name, row in registry.items():
        if name != "squad_val":
            assert re.fullmatch("[0-9a-f]{64}", row["sha256"]) and row["examples"] == sum(PUBLISHED[name])
    assert registry["squad_val"]["sha256"] is None


# Local files of the 57 tasks


def test_every_local_task_has_its_known_checksum_and_sizes(data_folder: Path):
    with settings.using(data_dir=data_folder):
        found = [name for name in PUBLISHED if function_vectors.FILES.local_path(name)]
        assert len(found) >= 40
        for name in found:
            task = load_task(f"fv/{name}")
            assert sizes(task) == PUBLISHED[name], name
            assert task.name == f"fv/{name}" and task.published_metric == "prefix_match"
            assert task.template == QA_TEMPLATE
            assert task.case_sensitive == ("capitalize" in name or "lowercase" in name)
            assert all(item.input and item.output for item in items(task)), name


def test_inputs_that_stand_in_train_and_test_are_noted(data_folder: Path):
    with settings.using(data_dir=data_folder):
        task = load_task("fv/conll2003_location")
    shared = {item.input for item in task.train} & {item.input for item in task.test}
    assert shared and task.note.startswith(f"{len(shared)} inputs of train")


def test_a_changed_file_is_refused_by_its_checksum(data_folder: Path, tmp_path: Path):
    name = "function_vectors/abstractive/country-capital.json"
    content = (data_folder / name).read_bytes()
    path = written(tmp_path / name, content)
    with settings.using(data_dir=tmp_path):
        assert load_task("fv/country-capital")
        path.write_bytes(content.replace(b"Paris", b"Berlin"))
        with pytest.raises(SitelensError, match=r"country-capital\.json is not the upstream file .* SHA-256"):
            load_task("fv/country-capital")


def test_a_data_folder_that_is_not_there_is_named(tmp_path: Path):
    with (
        settings.using(data_dir=tmp_path / "nowhere"),
        pytest.raises(SitelensError, match=r"nowhere does not exist \(SITELENS_DATA"),
    ):
        load_task("fv/antonym")


# Downloads, from a server of our own


@pytest.fixture
def upstream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that is served in place of the authors' repository; there is no local data folder."""
    folder = tmp_path / "upstream"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(folder))

        def log_message(self, format: str, *args: Any) -> None:
            pass

    monkeypatch.delenv("SITELENS_DATA", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server, settings.using(data_dir=None):
        files = replace(function_vectors.FILES, address=f"http://127.0.0.1:{server.server_port}/")
        monkeypatch.setattr(function_vectors, "FILES", files)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield folder
        server.shutdown()
        thread.join()


def test_a_downloaded_task_equals_the_local_one_and_is_kept(upstream: Path, data_folder: Path):
    name = "abstractive/country-capital.json"
    written(upstream / name, (data_folder / "function_vectors" / name).read_bytes())
    downloaded = load_task("fv/country-capital")
    shutil.rmtree(upstream)
    assert load_task("fv/country-capital") == downloaded
    with settings.using(data_dir=data_folder):
        assert load_task("fv/country-capital") == downloaded


def test_a_download_with_another_checksum_is_refused(upstream: Path):
    written(upstream / "abstractive" / "antonym.json", LISTED)
    with pytest.raises(SitelensError, match=r"fv/antonym could not be downloaded .*hash"):
        load_task("fv/antonym")


def test_a_server_that_cannot_be_reached_is_said_in_two_words(monkeypatch: pytest.MonkeyPatch):
    def retrieve(*_: Any, **__: Any) -> str:
        raise requests.ConnectionError("Max retries exceeded with url")

    monkeypatch.delenv("SITELENS_DATA", raising=False)
    monkeypatch.setattr(pooch, "retrieve", retrieve)
    with (
        settings.using(data_dir=None),
        pytest.raises(SitelensError, match=r"downloaded from http\S+antonym\.json: no connection\. Without a network"),
    ):
        load_task("fv/antonym")


def test_a_file_that_upstream_lacks_is_named(upstream: Path):
    with pytest.raises(SitelensError, match=r"fv/antonym could not be downloaded from http.*antonym\.json: .*404"):
        load_task("fv/antonym")
    gc.collect()  # a connection left open would be a warning now


def test_no_network_and_no_data_says_what_to_do(monkeypatch: pytest.MonkeyPatch):
    def offline(*_: object, **__: object) -> str:
        raise OSError("Network is unreachable")

    monkeypatch.delenv("SITELENS_DATA", raising=False)
    monkeypatch.setattr(pooch, "retrieve", offline)
    with pytest.raises(SitelensError, match=r"(?s)fv/antonym.*Network is unreachable.*abstractive.*SITELENS_DATA"):
        load_task("fv/antonym")


def test_an_unknown_checksum_is_recorded_once_and_enforced_afterwards(upstream: Path, own_cache: Path):
    served = written(upstream / "extractive" / "squad_val.json", LISTED)
    found = hashlib.sha256(served.read_bytes()).hexdigest()
    with pytest.warns(SitelensWarning, match=f"squad_val has no known checksum.*{found}"):
        first = load_task("fv/squad_val")
    assert load_task("fv/squad_val") == first  # a second warning would be an error

    [kept] = own_cache.rglob("squad_val.json")
    written(kept, [*LISTED, {"input": "a", "output": "b"}])
    assert load_task("fv/squad_val") == first  # downloaded again

    written(served, [*LISTED, {"input": "a", "output": "b"}])
    kept.unlink()
    with pytest.raises(SitelensError, match=f"(?s)squad_val.*{found}"):
        load_task("fv/squad_val")


@pytest.mark.parametrize("content", ["<html>Sign in</html>", "[]", '{"input": "a"}', '[{"question": "a"}]'])
def test_the_checksum_of_a_first_download_that_is_no_task_is_not_recorded(upstream: Path, content: str):
    served = written(upstream / "extractive" / "squad_val.json", content)
    with pytest.raises(SitelensError, match="squad_val"):
        load_task("fv/squad_val")
    written(served, LISTED)
    with pytest.warns(SitelensWarning, match="no known checksum"):
        assert len(items(load_task("fv/squad_val"))) == len(LISTED)


# Built-in tasks


def test_there_are_at_least_thirty_builtin_tasks():
    assert len(set(builtin.names())) == len(builtin.names()) >= 30


@pytest.mark.parametrize("name", builtin.names())
def test_a_builtin_task_has_whole_disjoint_splits(name: str):
    task = load_task(name)
    n = sum(sizes(task))
    train, valid = (70, 9) if name in builtin.GENERATED else (50, 15)
    assert n >= 120
    assert abs(len(task.train) - train * n / 100) <= 0.5 and abs(len(task.valid) - valid * n / 100) <= 0.5
    inputs = [item.input for split in SPLITS for item in task.split(split)]
    assert len(set(inputs)) == len(inputs)
    assert {(item.input, item.output, item.also) for item in items(task)} == set(builtin.pairs(name))
    assert task.name == name and task.source == "built in" and task.template == QA_TEMPLATE


@pytest.mark.parametrize("name", DIGESTS)
def test_a_builtin_task_is_the_same_everywhere(name: str):
    assert load_task(name).digest[:12] == DIGESTS[name]


def test_splits_of_a_builtin_task_are_mixed():
    inputs = [source for source, _, _ in builtin.pairs("next_item")]
    places = [inputs.index(item.input) for item in load_task("next_item").train]
    assert abs(np.mean(places) - (len(inputs) - 1) / 2) < len(inputs) / 20
    assert places != sorted(places)


# Names


def test_list_tasks_has_a_row_for_every_name():
    frame = list_tasks()
    assert frame["name"].tolist() == task_names()
    assert len(frame) == len(builtin.names()) + 57 + 3 + 14 + 27
    row = frame.set_index("name").loc["antonym"].to_dict()
    assert row["items"] == len(builtin.pairs("antonym")) and row["source"] == "built in" and row["description"]
    absent = frame.set_index("name")["items"].isna()
    assert absent.index[absent].tolist() == ["fv/squad_val", "anli/r1", "anli/r2", "anli/r3"]


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("antonim", "antonym"),
        ("Antonym", "antonym"),
        ("fv/antonim", "fv/antonym"),
        ("country_capital", "country-capital"),
        ("fv/squad", "fv/squad_val"),
        ("antonym.txt", "antonym"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(name: str, near: str):
    with pytest.raises(SitelensError, match=rf"unknown task '{re.escape(name)}': did you mean .*\b{near}\b"):
        load_task(name)


@pytest.mark.parametrize("name", ["xyzzy42", ""])
def test_a_name_near_to_nothing_is_answered_with_the_list(name: str):
    with pytest.raises(SitelensError, match=r"list_tasks\(\)"):
        load_task(name)


def test_a_task_is_returned_as_it_is():
    task = Task.from_pairs("own", PAIRS)
    assert load_task(task) is task
    assert load_tasks(task) == [task]


def test_load_tasks_keeps_the_order_and_takes_one_name_for_one_task():
    assert [task.name for task in load_tasks(["synonym", "antonym"])] == ["synonym", "antonym"]
    assert [task.name for task in load_tasks("antonym")] == ["antonym"]


def test_two_tasks_of_one_name_are_refused():
    other = Task.from_pairs("antonym", PAIRS)
    with pytest.raises(SitelensError, match="'antonym' is given 2 times"):
        load_tasks(["antonym", "synonym", other])


def test_an_unknown_split_is_refused():
    with pytest.raises(SitelensError, match="unknown split 'dev'; one of train, valid, test"):
        load_task("antonym").split("dev")


# Users' own tasks


@pytest.mark.parametrize(
    "pairs",
    [
        PAIRS,
        (pair for pair in PAIRS),
        [list(pair) for pair in PAIRS],
        [(*pair, ()) for pair in PAIRS],
        LISTED,
        [Example(*pair) for pair in PAIRS],
        [(f" {source}\n", f"\t{output} ") for source, output in PAIRS],
        [(source, [output]) for source, output in PAIRS],
    ],
    ids=["pairs", "generator", "lists", "triples", "dicts", "Examples", "with white space", "lists of answers"],
)
def test_items_may_be_given_in_several_forms(pairs: Any):
    task = Task.from_pairs("own", pairs)
    train, valid, test = function_vectors_split(4)
    assert task.train == tuple(Example(*PAIRS[i]) for i in train)
    assert task.valid == tuple(Example(*PAIRS[i]) for i in valid)
    assert task.test == tuple(Example(*PAIRS[i]) for i in test)
    assert task.name == "own" and task.source == "own"


@pytest.mark.parametrize(
    "item",
    [
        ("hot", "cold", ["icy", "cool"]),
        ("hot", "cold", "icy|cool"),
        ("hot", ["cold", "icy", "cool"]),
        {"input": "hot", "output": "cold", "also": ["icy", "cool"]},
        {"input": "hot", "output": ["cold", "icy"], "also": "cool"},
        {"input": "hot", "output": "cold", "also": " icy | cool |cold|"},
        Example("hot", "cold", ("icy", "cool")),
    ],
    ids=str,
)
def test_further_answers_may_be_given_in_several_forms(item: Any):
    task = Task.from_pairs("own", [item, *PAIRS[1:]])
    [hot] = [example for example in items(task) if example.input == "hot"]
    assert hot.answers == ("cold", "icy", "cool")


def test_numbers_become_text():
    task = Task.from_pairs("own", [(1, 2), (2, 3.5), ("3", np.int64(4)), (np.float64(0.5), "5")])
    assert items(task) == {Example("1", "2"), Example("2", "3.5"), Example("3", "4"), Example("0.5", "5")}


def test_options_are_fields_of_the_task():
    options: dict[str, Any] = {
        "published_metric": "exact_match",
        "template": "{input} -> {output}\n",
        "source": "s",
        "note": "n",
    }
    task = Task.from_pairs("own", PAIRS, case_sensitive=True, **options)
    assert {name: getattr(task, name) for name in options} == options and task.case_sensitive


NUMBERS = [
    (2.0, "2"), (0.1, "0.1"), (np.float32(0.1), "0.1"), (np.float16(0.1), "0.1"), (np.float64(2.5), "2.5"),
    (-0.0, "0"), (1e-7, "0.0000001"), (1e16, "10000000000000000"), (2.0**70, "1180591620717411303424"),
    (1 / 3, "0.3333333333333333"), (7, "7"), (np.int8(-7), "-7"), (np.uint64(2**64 - 1), "18446744073709551615"),
    (Decimal("2.50"), "2.50"), (Decimal("1E+3"), "1000"), (Fraction(1, 3), "1/3"),
    ("2.0", "2.0"), ("007", "007"), ("1e5", "1e5"), ("NaN", "NaN"), (np.str_("x"), "x"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "text"), NUMBERS)
def test_numbers_are_written_as_a_person_writes_them(value: Any, text: str):
    task = Task.from_pairs("n", [(value, "a", [value]), ("b", value), ("c", "c"), ("d", "d")])
    everything = {one for item in items(task) for one in (item.input, *item.answers)}
    assert everything == {text, *"abcd"}


def test_numbers_of_a_frame_and_a_file_keep_their_shortest_form(tmp_path: Path):
    frame = pd.DataFrame({"input": ["a", "b", "c", "d"], "output": np.array([0.1, 2, 2.5, 1e-5], np.float32)})
    task = Task.from_frame("n", frame)
    assert {item.input: item.output for item in items(task)} == {"a": "0.1", "b": "2", "c": "2.5", "d": "0.00001"}
    frame["output"] = pd.array([1, 2, 3, 4], "Int64")
    assert {item.output for item in items(Task.from_frame("n", frame))} == set("1234")
    frame["output"] = pd.array([1, 2, None, 4], "Int64")
    with pytest.raises(SitelensError, match="item 3"):
        Task.from_frame("n", frame)
    (tmp_path / "n.csv").write_text("input,output\na,2.0\nb,007\nc,1e5\nd,0.10\n")
    assert {item.output for item in items(load_task(tmp_path / "n.csv"))} == {"2.0", "007", "1e5", "0.10"}
    (tmp_path / "n.json").write_text('[["a", 2.0], ["b", "2.0"], ["c", 0.1], ["d", 1e3]]')
    assert {item.output for item in items(load_task(tmp_path / "n.json"))} == {"2", "2.0", "0.1", "1000"}


def test_a_frame_becomes_a_task():
    frame = pd.DataFrame(PAIRS, columns=["input", "output"], index=[7, 7, 8, 9]).assign(other=1)
    assert Task.from_frame("own", frame) == Task.from_pairs("own", PAIRS)


@pytest.mark.parametrize(
    "also",
    [["icy|cool", None, "", np.nan], [["icy", "cool"], [], [], []], [("icy", "cool"), np.nan, np.nan, np.nan],
     pd.array(["icy|cool", None, None, ""], dtype="string"), [np.array(["icy", "cool"]), None, None, None]],
    ids=["text", "lists", "tuples", "string dtype", "arrays"],
)  # fmt: skip
def test_a_frame_may_have_further_answers(also: Any):
    frame = pd.DataFrame(PAIRS, columns=["input", "output"]).assign(also=also)
    assert {item.input: item.also for item in items(Task.from_frame("own", frame)) if item.also} == {
        "hot": ("icy", "cool")
    }


def test_an_empty_cell_of_a_frame_is_refused():
    for dtype in (object, "string"):
        frame = pd.DataFrame([*PAIRS, ("wet", None)], columns=["input", "output"]).astype(dtype)
        with pytest.raises(SitelensError, match="item 5"):
            Task.from_frame("own", frame)


def test_a_frame_without_a_column_is_refused():
    with pytest.raises(SitelensError, match="no column output; there are: input, answer"):
        Task.from_frame("own", pd.DataFrame(PAIRS, columns=["input", "answer"]))


@pytest.mark.parametrize("content", [LISTED, [list(pair) for pair in PAIRS], {"examples": LISTED}], ids=str)
def test_a_json_file_becomes_a_task(tmp_path: Path, content: Any):
    path = written(tmp_path / "mine.json", content)
    expected = Task.from_pairs("mine", PAIRS, source=str(path))
    assert load_task(path) == load_task(str(path)) == expected


def test_a_json_file_may_name_and_describe_its_task(tmp_path: Path):
    plain = {"metric": "exact_match", "template": "{input}: {output}\n", "note": "from a book", "instruction": "Go."}
    chat = {"template": "chat", "template_arguments": {"enable_thinking": False, "date": "1 May"}}
    for options in (plain, chat):
        path = written(tmp_path / "mine.json", {"name": "opposites", "examples": LISTED, **options})
        fields: dict[str, Any] = {
            "published_metric" if name == "metric" else name: value for name, value in options.items()
        }
        assert load_task(path) == Task.from_pairs("opposites", PAIRS, source=str(path), **fields)
    assert load_task(path).template_arguments == (("date", "1 May"), ("enable_thinking", False))
    path = written(tmp_path / "mine.json", {"examples": LISTED, "template": "chat", "template_arguments": [1]})
    with pytest.raises(SitelensError, match=r"mine\.json: template_arguments must be like"):
        load_task(path)


def test_a_json_file_may_bring_its_own_splits(tmp_path: Path):
    content = {"train": LISTED[:2], "valid": [["up", "down", ["below"]]], "test": LISTED[3:]}
    task = load_task(written(tmp_path / "mine.json", content))
    assert task.train == (Example("hot", "cold"), Example("big", "small"))
    assert task.valid == (Example("up", "down", ("below",)),)
    assert task.test == (Example("in", "out"),)


def test_a_json_file_may_begin_with_a_byte_order_mark(tmp_path: Path):
    path = written(tmp_path / "mine.json", b"\xef\xbb\xbf" + json.dumps(LISTED).encode())
    assert items(load_task(path)) == {Example(*pair) for pair in PAIRS}


CSV = "input,output\n" + "".join(f"{source},{output}\n" for source, output in PAIRS)


@pytest.mark.parametrize(
    "content",
    [
        CSV.encode(),
        CSV.encode("utf-8-sig"),
        CSV.replace("\n", "\r\n").encode(),
        CSV.replace("\n", "\n\n").encode(),
        CSV.rstrip().encode(),
        re.sub(r"(\w+),(\w+)", r'"\1","\2"', CSV).encode(),
        re.sub(r"(\w+),(\w+)", r"note,\2,\1", CSV).encode(),
        CSV.replace("\n", "\r").encode(),
        CSV.replace(",", ";").encode(),
        CSV.replace(",", "\t").encode(),
        CSV.replace(",", "|").encode(),
        CSV.encode("utf-16"),
        CSV.replace("input,output", " input , output").encode(),
        CSV.replace("input,output", "Input,OUTPUT").encode(),
        re.sub(r"(?m)^(?=\w+,)", "0,", CSV).replace("0,input", ",input").encode(),
        re.sub(r"(?m)$(?<=.)", ",", CSV).encode(),
        (CSV + ",\n , \n,,,\n").encode(),
        ("sep=;\n" + CSV.replace(",", ";")).encode(),
    ],
    ids=["plain", "byte order mark", "CRLF", "blank lines", "no last newline", "quoted", "other columns", "CR",
         "semicolons", "tabs", "bars", "UTF-16", "header with spaces", "header in capitals", "index column",
         "trailing commas", "blank rows of commas", "Excel's sep line"],
)  # fmt: skip
def test_a_csv_file_becomes_a_task(tmp_path: Path, content: bytes):
    task = load_task(written(tmp_path / "mine.csv", content))
    assert items(task) == {Example(*pair) for pair in PAIRS}
    assert task.name == "mine"


def test_a_csv_file_may_have_further_answers(tmp_path: Path):
    lines = ["input,output,also", "hot,cold,icy|cool", "big,small,", "up,down", 'in,out,"off, away"']
    task = load_task(written(tmp_path / "mine.csv", "\n".join(lines)))
    assert {item.input: item.answers for item in items(task)} == {
        "hot": ("cold", "icy", "cool"), "big": ("small",), "up": ("down",), "in": ("out", "off, away"),
    }  # fmt: skip


@pytest.mark.parametrize(
    "text",
    ["one, two", 'say "so"', "two\nlines", "a\u2028b", "a\u2029b", "a\x85b", "a\x0cb", "a\x1cb", "{input}", "née"],
)
def test_any_text_survives_a_csv_file(tmp_path: Path, text: str):
    path = tmp_path / "mine.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("input", "output"), *PAIRS, (text, "x")])
    assert Example(text, "x") in items(load_task(path))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("mine.CSV", CSV),
        ("mine.tsv", CSV.replace(",", "\t")),
        ("mine.Jsonl", "\n".join(map(json.dumps, LISTED)) + "\n\n"),
        ("mine.ndjson", "\r\n".join(json.dumps(pair) for pair in PAIRS)),
        ("mine.JSON", LISTED),
    ],
)
def test_the_ending_says_what_a_file_is(tmp_path: Path, name: str, content: Any):
    path = written(tmp_path / name, content)
    assert load_task(path) == Task.from_pairs("mine", PAIRS, source=str(path))


def test_a_comma_in_a_tab_separated_file_is_text(tmp_path: Path):
    path = written(tmp_path / "mine.tsv", CSV.replace(",", "\t") + "one, two\tthree, four\n")
    assert Example("one, two", "three, four") in items(load_task(path))


def test_a_path_may_begin_with_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    written(tmp_path / "mine.csv", CSV)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert items(load_task("~/mine.csv")) == {Example(*pair) for pair in PAIRS}


def test_a_field_may_be_long(tmp_path: Path):
    limit = csv.field_size_limit()
    task = load_task(written(tmp_path / "mine.csv", CSV + "x" * 140_000 + ",end\n"))
    assert Example("x" * 140_000, "end") in items(task)
    assert csv.field_size_limit() == limit


def test_words_that_stand_for_nothing_elsewhere_are_text(tmp_path: Path):
    task = load_task(written(tmp_path / "mine.csv", CSV + "NA,null\nnan,None\n007,1.0\n"))
    assert {Example("NA", "null"), Example("nan", "None"), Example("007", "1.0")} <= items(task)


SPLIT = [*PAIRS, ("wet", "dry")]
PARTS = {"train": SPLIT[:3], "valid": SPLIT[3:4], "test": SPLIT[4:]}
LABELS = ["train", "Training ", "TRAIN", "validation", "test"]


def own_splits(task: Task) -> dict[str, list[tuple[str, str]]]:
    return {split: [(item.input, item.output) for item in task.split(split)] for split in SPLITS}


@pytest.mark.parametrize("name", ["mine.csv", "mine.tsv", "mine.jsonl", "mine.json"])
def test_a_file_may_say_each_items_split(tmp_path: Path, name: str):
    frame = pd.DataFrame(SPLIT, columns=["input", "output"]).assign(split=LABELS)
    path = tmp_path / name
    if name.endswith("sv"):
        frame.to_csv(path, index=False, sep="\t" if name.endswith(".tsv") else ",")
    else:
        frame.to_json(path, orient="records", lines=name.endswith("l"))
    assert own_splits(load_task(path)) == PARTS


def test_a_frame_may_say_each_items_split():
    frame = pd.DataFrame(SPLIT, columns=["input", "output"]).assign(split=pd.Categorical(LABELS))
    assert own_splits(Task.from_frame("own", frame)) == PARTS
    assert Task.from_frame("own", frame, split=None) == Task.from_pairs("own", SPLIT)
    with pytest.raises(SitelensError, match=r"item 5: the split must be train, valid or test, not nan"):
        Task.from_frame("own", frame.assign(split=[*LABELS[:4], np.nan]))
    with pytest.raises(SitelensError, match=r"task 'own': the test split is empty"):
        Task.from_frame("own", frame[:4])


def test_columns_may_have_other_names(tmp_path: Path):
    frame = pd.DataFrame(SPLIT, columns=["Question", "label"]).assign(part=LABELS, more=["icy|cool", "", "", "", ""])
    names: dict[str, Any] = {"input": "question", "output": "label", "also": "more", "split": "part"}
    expected = Task.from_frame("mine", frame, **names)
    assert own_splits(expected) == PARTS and expected.train[0].also == ("icy", "cool")
    for name in ("mine.csv", "mine.jsonl", "mine.json"):
        path = tmp_path / name
        if name.endswith("v"):
            frame.to_csv(path, sep=";")
        else:
            frame.to_json(path, orient="records", lines=name.endswith("l"))
        assert load_task(path, **names) == replace(expected, source=str(path))
    assert Task.from_frame("own", pd.DataFrame(PAIRS), input=0, output=1) == Task.from_pairs("own", PAIRS)


def test_the_separator_may_be_named(tmp_path: Path):
    path = written(tmp_path / "mine.csv", CSV.replace(",", ":"))
    assert items(load_task(path, sep=":")) == {Example(*pair) for pair in PAIRS}
    with pytest.raises(SitelensError, match="sep must be one character, not '::'"):
        load_task(path, sep="::")
    with pytest.raises(SitelensError, match=r"sep is for \.csv and \.tsv"):
        load_task(written(tmp_path / "mine.json", LISTED), sep=";")


def test_a_seed_decides_the_split(tmp_path: Path):
    pairs = [(f"q{i}", f"a{i}") for i in range(40)]
    default, other = Task.from_pairs("mine", pairs), Task.from_pairs("mine", pairs, seed=1)
    assert default == Task.from_pairs("mine", pairs, seed=32) and items(default) == items(other)
    assert default.test != other.test and sizes(default) == sizes(other)
    assert Task.from_frame("mine", pd.DataFrame(pairs, columns=["input", "output"]), seed=1) == other
    path = written(tmp_path / "mine.json", pairs)
    assert load_task(path, seed=1) == replace(other, source=str(path))


def test_what_is_for_files_is_refused_elsewhere():
    examples: list[dict[str, Any]] = [{"seed": 1}, {"input": "question"}, {"sep": ";"}]
    for options in examples:
        with pytest.raises(SitelensError, match=r"columns, sep and seed are for files .*'antonym' is none"):
            load_task("antonym", **options)
        with pytest.raises(SitelensError, match="'own' is a task already"):
            load_task(Task.from_pairs("own", PAIRS), **options)


def test_an_unknown_field_is_named():
    with pytest.raises(SitelensError, match="'own': a task has no field 'metrics'"):
        Task.from_pairs("own", PAIRS, metrics="exact_match")


def test_a_mapping_is_pairs():
    assert Task.from_pairs("own", dict(PAIRS)) == Task.from_pairs("own", PAIRS)


@pytest.mark.parametrize(
    ("value", "hint"),
    [(pd.DataFrame(PAIRS), "use Task.from_frame"), (PAIRS, "use load_tasks"), (5, "not int"), (None, "not NoneType")],
)
@pytest.mark.usefixtures("unchecked")
def test_what_is_no_task_is_answered_with_what_makes_one(value: Any, hint: str):
    with pytest.raises(SitelensError, match=f"a task is a name, a file or a Task, .*{hint}"):
        load_task(value)


# Bad input


@pytest.mark.parametrize("text", ["a\ud83d", "\udc80", "a\0b"], ids=ascii)
def test_text_that_no_file_could_hold_is_refused_wherever_it_stands(tmp_path: Path, text: str):
    for pairs in ([*PAIRS, (text, "x")], [*PAIRS, ("x", text)], [*PAIRS, ("x", "y", [text])]):
        with pytest.raises(SitelensError, match=r"'own', .* item .*: a text, .* (is not Unicode|has a NUL)"):
            Task.from_pairs("own", pairs)
    with pytest.raises(SitelensError, match=r"a task's name, .* (is not Unicode|has a NUL)"):
        Task.from_pairs(text, PAIRS)
    with pytest.raises(SitelensError, match=r"is not Unicode|has a NUL"):
        load_task(written(tmp_path / "mine.json", [*PAIRS, (text, "x")]))


@pytest.mark.usefixtures("unchecked")
def test_a_task_made_by_hand_is_checked_and_cannot_change():
    examples = [Example(*pair) for pair in PAIRS]
    task = Task("own", "own", examples, examples[:1], tuple(examples[:2]))  # type: ignore[arg-type]
    digest = Task("own", "own", tuple(examples), tuple(examples[:1]), tuple(examples[:2])).digest
    examples.pop()
    assert task.digest == digest and len(task.train) == 4
    with pytest.raises(SitelensError, match=r"'own', valid item 1: .* is no Example; Task.from_pairs takes pairs"):
        Task("own", "own", (), (PAIRS[0],), ())  # type: ignore[arg-type]
    for name in ("", "  ", 5, None):
        with pytest.raises(SitelensError, match="a task's name must be text and not empty"):
            Task.from_pairs(name, PAIRS)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("item", "why"),
    [
        ({"input": "wet"}, "no output in"),
        ({"output": "dry"}, "no input in"),
        ({"input": "wet", "output": None}, "no output in"),
        ({"question": "wet", "answer": "dry"}, "no input and no output in"),
        (("wet", ""), "the output of 'wet' is empty"),
        (("wet", " \n"), "the output of 'wet' is empty"),
        (("wet", []), "the output of 'wet' is empty"),
        ((" ", "dry"), "the input is empty"),
        (("wet", None), "output"),
        ((None, "dry"), "input"),
        (("wet", [None]), "output"),
        (("wet", float("nan")), "nan is no finite number; give every item a value"),
        (("wet", np.float32("inf")), "inf.* is no finite number"),
        (("wet", Decimal("nan")), "is no finite number"),
        (("wet", np.True_), "must be text"),
        (("wet", True), "must be text"),
        (("wet", {"a": 1}), "must be text"),
        (("wet", [["dry"]]), "must be text"),
        ((b"wet", "dry"), "must be text"),
        ("wet", "neither a pair"),
        ("we", "neither a pair"),
        (("wet",), "neither a pair"),
        (("wet", "dry", (), 1), "neither a pair"),
        (None, "neither a pair"),
        (5, "neither a pair"),
        (Example("wet", ""), "the output of 'wet' is empty"),
        (Example("", "dry"), "the input is empty"),
        (("wet", "dry", 5), "text"),
        ({"input": "wet", "output": "dry", "also": 5}, "text"),
        ({"input": "wet", "output": "dry", "also": [None]}, "text"),
        ({"input": "wet", "output": "dry", "also": {"a": 1}}, "text"),
    ],
    ids=str,
)
def test_an_item_that_cannot_be_used_is_named_with_the_reason(item: Any, why: str):
    with pytest.raises(SitelensError, match=rf"(?s)task 'own', item 5: .*{why}"):
        Task.from_pairs("own", [*PAIRS, item])


@pytest.mark.parametrize("n", [0, 1, 2, 3])
def test_items_too_few_to_fill_every_split_are_refused(n: int):
    with pytest.raises(SitelensError, match=f"'own' has {n} items: at least 4"):
        Task.from_pairs("own", PAIRS[:n])


def test_four_items_fill_every_split():
    assert sizes(Task.from_pairs("own", PAIRS)) == (2, 1, 1)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("[1, ", "is not JSON: .*column"),
        ("", "is not JSON"),
        ("hot,cold", "is not JSON"),
        (b"\xff\xfe[", "is not UTF-8 text"),
        (5, "must hold a list of items or an object, not int"),
        (None, "must hold a list of items or an object, not NoneType"),
        ({}, 'must hold "examples", or "train", "valid" and "test"'),
        ({"train": LISTED, "test": LISTED}, 'must hold "examples", or "train", "valid" and "test"'),
        ({"examples": {"hot": "cold"}}, "the items must be a list, not dict"),
        ({"train": LISTED, "valid": "hot", "test": LISTED}, "the items must be a list, not str"),
        ({"train": LISTED[:2], "valid": [], "test": LISTED[2:]}, "the valid split is empty"),
        (
            {"train": LISTED[:2], "valid": LISTED[2:3], "test": [*LISTED[3:], {"input": "wet"}]},
            "test item 2: no output",
        ),
        ([*LISTED, {"input": "wet"}], "item 5: no output in"),
        ([*LISTED, ["wet", None]], "item 5: .*output"),
        (LISTED[:2], "has 2 items: at least"),
        ({"examples": LISTED, "metric": "accuracy"}, "unknown metric 'accuracy'; one of first_token, "),
        ({"examples": LISTED, "template": "Q: {input}"}, "'Q: {input}' must contain"),
        ({"examples": LISTED, "template": 5}, "template"),
        ({"examples": LISTED, "note": 5}, "note"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_json_file_that_cannot_be_used_is_refused_with_the_reason(tmp_path: Path, content: Any, why: str):
    path = written(tmp_path / "mine.json", content)
    with pytest.raises(SitelensError, match=rf"(?s)(mine|the template).*{why}"):
        load_task(path)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("", "no column input or output; there are: none"),
        (CSV.replace(",", "~"), "no column input or output; there are: input~output"),
        (
            CSV.replace("output", "answer"),
            r"no column output; there are: input, answer \(name the columns with output=",
        ),
        (CSV.replace("output", "Outputs"), r"name the columns with output='Outputs'"),
        (CSV.replace("input,output", "input,output,input"), "2 columns are named 'input'; names must differ"),
        (CSV.replace("input,output", "Input,output,INPUT"), "2 columns are named 'input'; names must differ"),
        ("input,output,split\n" + "a,b,train\n" * 4, "the valid split is empty"),
        (
            "input,output,split\na,b,train\na,b,nowhere\n",
            "item 2: the split must be train, valid or test, not 'nowhere'",
        ),
        ("input,output,split\na,b,train\na,b\n", "item 2: the split must be .* not None"),
        ("input,output\n", "has 0 items"),
        (CSV + "wet\n", "item 5: no output in"),
        (CSV + "wet,\n", "item 5: the output of 'wet' is empty"),
        (CSV + "wet, damp,dry\n", "item 5: 3 fields, but the header has 2"),  # a comma that should have been quoted
        (CSV + 'wet,"dry\n' + CSV, "quot|end of data"),
        (CSV + 'wet,"dry\n' + CSV * 5000, "quot|end of data|field"),
        (CSV.encode("utf-16-le"), "no column|is not UTF-8 text"),
        (CSV.encode() + "née,née\n".encode("latin-1"), "is not UTF-8 text"),
    ],
    ids=lambda value: str(value)[-60:],
)
def test_a_csv_file_that_cannot_be_used_is_refused_with_the_reason(tmp_path: Path, content: Any, why: str):
    path = written(tmp_path / "mine.csv", content)
    with pytest.raises(SitelensError, match=rf"(?s)mine.*({why})"):
        load_task(path)


@pytest.mark.parametrize("name", ["mine.json", "mine.csv"])
def test_a_file_that_is_not_there_is_named(tmp_path: Path, name: str):
    with pytest.raises(SitelensError, match=f"there is no task file .*{name}"):
        load_task(tmp_path / name)


def test_a_folder_is_no_task_file(tmp_path: Path):
    (tmp_path / "mine.json").mkdir()
    with pytest.raises(SitelensError, match=r"mine\.json"):
        load_task(tmp_path / "mine.json")


@pytest.mark.parametrize(
    "template",
    ["", "Q: {input}", "{output}", "{output} {input}", "{input}{output}", "{input} {input} {output}",
     "{input} {output} {output}", "Q: {question}\nA: {answer}"],
)  # fmt: skip
def test_a_template_without_both_places_in_order_is_refused(template: str):
    for use in (check_template, lambda template: Task.from_pairs("own", PAIRS, template=template)):
        with pytest.raises(SitelensError, match=re.escape(repr(template))):
            use(template)


@pytest.mark.parametrize(
    "template", ["chat", QA_TEMPLATE, "{input} {output}", "{input}\n{output}", "a{input}b{output}c"]
)
def test_a_template_with_both_places_in_order_is_taken(template: str):
    assert Task.from_pairs("own", PAIRS, template=template).template == template


# Repeats


def test_exact_duplicates_warn():
    with pytest.warns(SitelensWarning, match="'own': 2 items occur more than once, for example 'hot'") as caught:
        Task.from_pairs("own", [*PAIRS, PAIRS[0], PAIRS[1], PAIRS[0]])
    assert len(caught) == 1


def test_duplicates_warn_across_the_splits_of_a_file(tmp_path: Path):
    content = {"train": LISTED, "valid": LISTED[:1], "test": [{"input": "wet", "output": "dry"}]}
    with pytest.warns(SitelensWarning, match="more than once"):
        load_task(written(tmp_path / "mine.json", content))


def test_the_same_input_with_different_outputs_is_listed():
    with pytest.warns(SitelensWarning, match="different outputs: 'hot': cold, icy; 'up': below, down$") as caught:
        Task.from_pairs("own", [*PAIRS, ("up", "below"), ("hot", "icy")])
    assert len(caught) == 1


def test_a_long_list_of_clashes_is_cut():
    pairs = [(str(i), output) for i in range(8) for output in "ab"]
    with pytest.warns(SitelensWarning, match=r"'4': a, b and 3 more$"):
        Task.from_pairs("own", pairs)


# Identity


@pytest.mark.parametrize(
    "change",
    [
        lambda task: replace(task, name="other"),
        lambda task: replace(task, case_sensitive=True),
        lambda task: replace(task, template="{input} {output}"),
        lambda task: replace(task, train=task.train[::-1]),
        lambda task: replace(task, train=task.train[1:]),
        lambda task: replace(task, train=task.train[1:], valid=(*task.valid, task.train[0])),
        lambda task: replace(task, test=(replace(task.test[0], input="x"), *task.test[1:])),
        lambda task: replace(task, test=(replace(task.test[0], output="x"), *task.test[1:])),
        lambda task: replace(task, test=(replace(task.test[0], also=("x",)), *task.test[1:])),
    ],
    ids=["name", "case", "template", "order", "fewer", "another split", "input", "output", "also"],
)
def test_the_digest_changes_with_what_decides_a_result(change: Callable[[Task], Task]):
    task = Task.from_pairs("own", [*PAIRS, ("wet", "dry")])
    assert change(task).digest != task.digest


def test_the_digest_does_not_change_with_what_is_only_said():
    task = Task.from_pairs("own", PAIRS)
    assert replace(task, source="elsewhere", note="checked", published_metric="exact_match").digest == task.digest
    assert Task.from_pairs("own", LISTED).digest == task.digest


def test_a_task_cannot_be_changed():
    with pytest.raises(AttributeError):
        load_task("antonym").name = "other"  # type: ignore[misc]


def test_tasks_do_without_torch():
    code = "import sys, sitelens.tasks as t; t.load_task('antonym'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
