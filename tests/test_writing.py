"""Files are written completely or not at all, under safe names; outside text never acts as markup or formula."""

from __future__ import annotations

import errno
import os
import re
import stat
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pandas as pd
import pytest

import sitelens as sl
from sitelens.files import writing
from sitelens.files.escaping import csv_text, figure_text, html_text, latex_text, markdown_text, text_of_csv, visible
from sitelens.files.writing import (
    MissingOutputWarning,
    Outputs,
    check_file_name,
    check_folder,
    file_name,
    file_names,
    write_bytes,
    write_csv,
    write_text,
)

quick = hypothesis.settings(deadline=None, max_examples=150, derandomize=True, database=None)
texts = st.text(st.characters(exclude_categories=()), max_size=200)


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every flush to disk fails."""

    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writing.os, "fsync", fail)


# Writing


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, full_disk: None) -> None:
    (tmp_path / "a.txt").write_bytes(b"old")
    with pytest.raises(OSError, match="No space left"):
        write_bytes(tmp_path / "a.txt", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"] and (tmp_path / "a.txt").read_bytes() == b"old"


def test_an_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(writing.os, step, interrupt)
            with pytest.raises(KeyboardInterrupt):
                write_text(tmp_path / "a.txt", "new")
        assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_fsync_is_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(writing.os, "fsync", fail)
    assert write_text(tmp_path / "new" / "a.txt", "é\n").read_bytes() == "é\n".encode()


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        path = write_text(tmp_path / "a.txt", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_symbolic_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "a.txt").symlink_to(tmp_path / "real" / "b.txt")
    write_text(tmp_path / "a.txt", "x")
    assert (tmp_path / "a.txt").is_symlink() and (tmp_path / "real" / "b.txt").read_text() == "x"


def test_a_lone_surrogate_is_written_as_its_escape(tmp_path: Path) -> None:
    assert write_text(tmp_path / "a.txt", "a\ud800b").read_bytes() == rb"a\ud800b"


def test_a_folder_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "a" / "b"):
        check_folder(folder)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("folder", "why"),
    [("file", "is a file, not a folder"), ("file/sub", "is a file, not a folder"), ("x" * 300, "name too long"),
     ("a\0b", "null")],
)  # fmt: skip
def test_a_folder_that_cannot_be_is_refused(tmp_path: Path, folder: str, why: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(sl.SitelensError, match=rf"(?is)^cannot write to the folder .*{why}"):
        check_folder(tmp_path / folder)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_on_a_full_disk_is_refused(tmp_path: Path, full_disk: None) -> None:
    with pytest.raises(sl.SitelensError, match="No space left"):
        check_folder(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_is_named_and_the_rest_is_written(tmp_path: Path) -> None:
    (tmp_path / "b.txt").mkdir()  # in the way

    def refuse(path: Path) -> None:
        raise sl.SitelensError(f"{path.name} needs a tool")

    outputs = Outputs(tmp_path)
    for name in ("a.txt", "b.txt", "c.txt"):
        outputs.write(name, lambda path: write_text(path, "x"))
    outputs.write("d.png", refuse)
    outputs.write("e.png", lambda path: write_text(path, "x"))
    with pytest.warns(MissingOutputWarning) as record, outputs:
        pass
    assert [path.name for path in outputs.paths] == ["a.txt", "c.txt", "e.png"]
    [warning] = record
    assert str(warning.message) == (
        f"not everything was written to {tmp_path}: b.txt cannot be written: Is a directory; d.png needs a tool"
    )
    assert not list(tmp_path.glob(".*"))


def test_where_nothing_can_be_written_it_is_an_error(tmp_path: Path, full_disk: None) -> None:
    outputs = Outputs(tmp_path)
    for name in ("a", "b"):
        outputs.write(name, lambda path: write_text(path, "x"))
    with pytest.raises(sl.SitelensError, match=r"nothing was written to .*: a, b cannot be written: No space"), outputs:
        pass


# File names


@pytest.mark.parametrize(
    ("name", "file"),
    [("antonym", "antonym"), ("fv/antonym", "fv-antonym"), ("mmlu-pro/computer science", "mmlu-pro-computer science"),
     ("v1.5", "v1.5"), ("任务 🐈", "任务 🐈"), ("Über_3+4=7", "Über_3+4=7")],
)  # fmt: skip
def test_a_plain_name_stays_as_it_is(name: str, file: str) -> None:
    assert file_name(name) == file and file_names([name]) == {name: file}


HOSTILE = [
    "../../etc/x", "/etc/passwd", "a/b/c", "..", ".", "", " ", ".hidden", "~", "-rf", "C:\\x", "a\0b", "a\nb",
    "x" * 300,
    "任" * 200, "CON", "con.txt", "LPT1", "what?: <x>", 'x"><img src=q onerror=alert(1)>', "a|b", "end. ", "\u202eabc",
    "\ud800", "a/../b", "plotly.min.js/..", "*", "a\u2028b", "𝕏" * 90, "e\u0301" * 100,
]  # fmt: skip


def assert_safe(file: str, folder: Path) -> None:
    whole = f"{file}.embedding.safetensors"
    assert len(whole.encode()) <= 143
    assert (folder / whole).resolve().parent == folder.resolve() and file[0] not in " .-~"
    assert not set(file) & set('<>:"/\\|?*') and file.isprintable() and file == file.rstrip(" .")
    assert file.split(".")[0].upper() not in {"CON", "PRN", "AUX", "NUL", *(f"{d}{i}" for d in ("COM", "LPT")
                                                                             for i in range(10))}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_any_name_becomes_a_safe_file_name(name: str, tmp_path: Path) -> None:
    file = file_name(name)
    assert_safe(file, tmp_path)
    assert file != name and file_name(file) == file
    write_text(tmp_path / f"{file}.embedding.safetensors", "x")


@quick
@hypothesis.given(texts)
def test_a_file_name_is_safe_and_stays(name: str) -> None:
    file = file_name(name)
    assert len(f"{file}.embedding.safetensors".encode()) <= 143
    assert file_name(file) == file and "/" not in file and not file.startswith((".", "-"))


@pytest.mark.parametrize(
    "names",
    [["a/b", "a-b"], ["Task", "task"], ["é", "e\u0301"], ["x" * 300, "x" * 301], ["a?", "a*", "a-"], ["ß", "SS"],
     ["fi", "ﬁ"], ["a|b", "a-b"], HOSTILE],
    ids=lambda names: ascii(names)[:20],
)  # fmt: skip
def test_files_of_different_names_are_different(names: list[str], tmp_path: Path) -> None:
    files = file_names(names)
    assert list(files) == names and len({file.casefold() for file in files.values()}) == len(names)
    assert file_names(reversed(names)) == files
    for file in files.values():
        assert_safe(file, tmp_path)


@pytest.mark.parametrize("name", [*HOSTILE, "fv/antonym", None, 3], ids=ascii)
def test_a_name_that_a_user_gives_is_checked(name: Any) -> None:
    with pytest.raises(sl.SitelensError, match="--name must be a plain file name"):
        check_file_name(name, "--name")
    assert check_file_name("transfer-fv57", "--name") == "transfer-fv57"


# Escaping


def test_what_cannot_be_seen_is_shown() -> None:
    assert visible("a\nb\x1b[2J\u202e\u2028\ud800\0") == r"a\nb\x1b[2J\u202e\u2028\ud800\x00"
    for text in ("naïve 任务 🐈 👩‍💻", "a\u00a0b", "می‌خواهم"):
        assert visible(text) == text


def test_markup_of_figures_is_text() -> None:
    assert figure_text("a<b> & $x$ %{y} 100%") == "a&lt;b> &amp; &#36;x&#36; %&#123;y} 100%"
    assert figure_text("alpha > 0.5") == "alpha > 0.5" and figure_text(3) == "3"


@pytest.mark.parametrize(
    ("text", "cell"),
    [("a|b", r"a\|b"), ("a\nb", r"a\\nb"), ("<img src=q>", "&lt;img src=q>"), ("`x`", r"\`x\`"), ("*x*", r"\*x\*"),
     ("[x](javascript:1)", r"[x\](javascript:1)"), ("![x][y]", r"![x\][y]"), ("&lt;", "&amp;lt;"), ("R&D", "R&D"),
     ("_x_", r"\_x\_"), ("choose_first_of_3", "choose_first_of_3"), ("53 [43, 62]", "53 [43, 62]"), ("$x$", r"\$x\$"),
     ("a\\|b", r"a\\\|b"), ("~~x~~", r"\~\~x\~\~")],
)  # fmt: skip
def test_markup_of_markdown_is_text(text: str, cell: str) -> None:
    assert markdown_text(text) == cell


@pytest.mark.parametrize(
    ("text", "cell"),
    [("R&D 5%", r"R\&D 5\%"), ("a_b", r"a\_b"), (r"\input{x}", r"\textbackslash{}input\{x\}"),
     ("$x^2$", r"\$x\textasciicircum{}2\$"),
     ("a<b|c>", r"a\textless{}b\textbar{}c\textgreater{}"), ("[x] 53 [43, 62]", "{}[x] 53 [43, 62]"), ("*", "{}*"),
     ("--x", "-{}-x"), ("a\nb", r"a\textbackslash{}nb"), ("naïve 任务 ±3", "naïve 任务 ±3"), (3, "3")],
)  # fmt: skip
def test_markup_of_latex_is_text(text: object, cell: str) -> None:
    assert latex_text(text) == cell


LATEX = {
    r"\textbackslash{}": "\\", r"\textasciitilde{}": "~", r"\textasciicircum{}": "^", r"\textless{}": "<",
    r"\textgreater{}": ">", r"\textbar{}": "|", r"\char34{}": '"', r"\textasciigrave{}": "`", "{}": "",
    **{f"\\{letter}": letter for letter in "{}$&#%_"},
}  # fmt: skip


@quick
@hypothesis.given(texts | st.text("\\{}$&#%_^~<>|\"'`-,?![*", max_size=8))
def test_latex_shows_the_text_and_runs_nothing(text: str) -> None:
    escaped = latex_text(text)
    parts = re.split("|".join(map(re.escape, LATEX)), escaped)
    assert not any(set('\\{}$&#%_~^<>|"`') & set(part) for part in parts)
    assert not re.search(r"--|''|,,", escaped) and not escaped.startswith(("[", "*"))
    shown = re.sub("|".join(map(re.escape, LATEX)), lambda match: LATEX[match[0]], escaped)
    assert shown == visible(text)


def test_markup_of_html_is_text() -> None:
    assert html_text('<b>"&\n') == "&lt;b&gt;&quot;&amp;\\n" and html_text(3) == "3"


@pytest.mark.parametrize(
    "text", ["=1+1", "+cmd|' /C calc'!A0", "-x", "@SUM(A1)", "\t=1", "\r=1", " =1", "'=1", "＝1", "-"]
)
def test_a_formula_gets_an_apostrophe(text: str) -> None:
    assert csv_text(text) == f"'{text}" and text_of_csv(csv_text(text)) == text


@pytest.mark.parametrize("text", ["-5", "+3.5", "-1e-5", "a=b", "antonym", "", "'tis", "3-4"])
def test_other_cells_stay_as_they_are(text: str) -> None:
    assert csv_text(text) == text == text_of_csv(text)


@quick
@hypothesis.given(texts | st.text("='+-@ \ta1", max_size=6))
def test_csv_escaping_has_an_inverse(text: str) -> None:
    assert text_of_csv(csv_text(text)) == text


def test_a_csv_file_keeps_numbers_and_defuses_formulas(tmp_path: Path) -> None:
    counts = pd.array([-1, None, 2, 3], "Int64")
    frame = pd.DataFrame({"task": ["=1+1", "a,b", None, 'q"'], "-x": [-1.5, 2, 3, 4], "n": counts,
                          "kind": pd.Categorical(["@a", "b", "b", "b"])}, index=[3, 3, 1, 0])  # fmt: skip
    before = frame.copy()
    path = write_csv(tmp_path / "a.csv", frame)
    assert path.read_text() == 'task,\'-x,n,kind\n\'=1+1,-1.5,-1,\'@a\n"a,b",2.0,,b\n,3.0,2,b\n"q""",4.0,3,b\n'
    pd.testing.assert_frame_equal(frame, before)
    assert pd.read_csv(path)["'-x"].tolist() == [-1.5, 2, 3, 4]
