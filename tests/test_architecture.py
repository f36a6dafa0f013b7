"""The structure of the code: one-way imports, short files, documented public names, no pickles."""

from __future__ import annotations

import ast
import functools
import graphlib
import importlib
import inspect
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

import sitelens

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sitelens"
BRIDGED = {  # may import transformer_lens
    "models", "engine", "heads", "methods"
}  # fmt: skip
LONGEST = 320  # lines
PICKLING = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
FOLDERS = re.compile(r"(?<![\w.~-])/(?:home|tmp|root|Users|work|mnt|scratch)/")  # of a specific machine

FILES = {
    path: module
    for path in sorted(PACKAGE.rglob("*.py"))
    if (module := path.relative_to(PACKAGE).with_suffix("").parts[0]) != "__init__"
}
MODULES = sorted(set(FILES.values()))


def listed_modules() -> list[str]:
    """The modules in the order of the list in README; each imports only from those above it."""
    block = re.search(r"\n    sitelens/\n((?: {6}.*\n)+)", (ROOT / "README.md").read_text("utf-8"))
    assert block
    return [line.split()[0].removesuffix("/").removesuffix(".py") for line in block.group(1).splitlines()]


ORDER = listed_modules()
SOURCES = [path for folder in ("sitelens", "tests", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))]


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


@functools.cache
def imports(path: Path) -> set[str]:
    """Dotted names of everything that a file imports, anywhere in the file."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names}
    return found


def own_imports(module: str) -> set[str]:
    """The modules of sitelens that a module imports from; "sitelens" stands for its public names."""
    names = {name for path, home in FILES.items() if home == module for name in imports(path)}
    parts = [name.split(".") for name in names if name.split(".")[0] in ("sitelens", "")]
    return {next((part for part in path[1:2] if part in MODULES), "sitelens") for path in parts} - {module}


# Imports


def test_the_readme_lists_every_module_once():
    assert sorted(ORDER) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_from_those_above_it_in_the_readme_only(module: str):
    assert own_imports(module) <= set(ORDER[: ORDER.index(module)])


def test_the_imports_are_seen():
    assert {"reports", "settings", "store", "tasks"} <= own_imports("cli")  # most of them inside functions
    assert {"figures", "models"} <= own_imports("conditions")


def test_no_two_files_import_each_other():
    """Longer import cycles are not allowed either; an `__init__.py` counts as the files it imports names from."""
    names = {f"sitelens.{'.'.join(path.relative_to(PACKAGE).with_suffix('').parts)}": path for path in FILES}
    arrows = {name: {other for other in names if other != name and imports_file(path, other)} for name, path in
              names.items() if path.name != "__init__.py"}  # fmt: skip
    assert len(arrows) > 60
    graphlib.TopologicalSorter(arrows).prepare()  # raises CycleError, which lists the cycle


def imports_file(path: Path, module: str) -> bool:
    return any(name == module or name.startswith(f"{module}.") for name in imports(path))


def test_only_few_modules_know_transformer_lens():
    found = {FILES[path] for path in FILES if any(name.split(".")[0] == "transformer_lens" for name in imports(path))}
    assert "models" in found and found <= BRIDGED


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_no_star_imports(path: Path):
    assert [name for name in imports(path) if name.endswith("*")] == []


# Files


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=relative)
def test_a_file_is_short_and_says_what_it_is(path: Path):
    assert len(path.read_text("utf-8").splitlines()) <= LONGEST
    assert ast.get_docstring(tree(path))


def pickling(node: ast.AST) -> bool:
    """Whether a piece of code reads or writes pickles."""
    if isinstance(node, ast.Import):
        return any(alias.name.split(".")[0] in PICKLING for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        return (node.module or "").split(".")[0] in PICKLING
    if isinstance(node, ast.Attribute):
        of_torch = isinstance(node.value, ast.Name) and node.value.id == "torch" and node.attr in ("load", "save")
        return of_torch or node.attr in ("read_pickle", "to_pickle")
    return isinstance(node, ast.keyword) and node.arg == "allow_pickle"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_nothing_is_pickled(path: Path):
    assert [getattr(node, "lineno", None) for node in ast.walk(tree(path)) if pickling(node)] == []


@pytest.mark.parametrize(
    "code",
    ["import pickle", "from joblib import load", "torch.load(p)", "torch.save(x, p)", "frame.to_pickle(p)",
     "np.load(p, allow_pickle=True)"],
)  # fmt: skip
def test_pickling_is_seen(code: str):
    assert any(map(pickling, ast.walk(ast.parse(code))))


def test_no_tracked_file_names_a_folder_of_somebodys_machine():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("this is no git checkout")
    found = []
    for name in listed.stdout.decode().split("\0")[:-1]:
        try:
            lines = (ROOT / name).read_text("utf-8").splitlines()
        except (UnicodeDecodeError, FileNotFoundError):  # an image, or a file removed meanwhile
            continue
        found += [
            f"{name}:{number}: {line.strip()[:99]}" for number, line in enumerate(lines, 1) if FOLDERS.search(line)
        ]
    assert found == []


def test_folders_of_somebodys_machine_are_seen():
    assert FOLDERS.search("venv = '/" + "tmp/venv'") and FOLDERS.search("/" + "home/me/x")
    assert not FOLDERS.search("https://example.org/" + "home/x") and not FOLDERS.search("~/" + "work/x")


# Public names


def lazy_and_typed() -> tuple[dict[str, str], dict[str, str]]:
    """Two dicts from public names to modules: as loaded lazily, and as type checkers see them."""
    lazy = {name: f"sitelens.{home}" for home, names in sitelens._EXPORTS.items() for name in names}
    [block] = [
        node
        for node in tree(PACKAGE / "__init__.py").body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    typed = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            assert alias.asname == alias.name  # otherwise type checkers treat it as private
            typed[alias.name] = str(node.module)
    return lazy, typed


def test_type_checkers_see_what_is_loaded_lazily():
    lazy, typed = lazy_and_typed()
    assert {typed.pop(room) for room in sitelens._SUBPACKAGES} == {"sitelens"}
    assert typed == lazy
    assert sorted(sitelens.__all__) == sorted(["__version__", "settings", *sitelens._SUBPACKAGES, *lazy])


def test_dir_lists_the_public_names():
    assert dir(sitelens) == sorted(sitelens.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'sitelens' has no attribute 'nonsense'"):
        getattr(sitelens, "nonsense")  # noqa: B009 (pyright knows that it is not there)


@pytest.mark.parametrize("name", sorted(set(sitelens.__all__) - {"__version__", "settings", *sitelens._SUBPACKAGES}))
def test_a_public_name_lives_in_its_home(name: str):
    home = lazy_and_typed()[0][name]
    assert getattr(sitelens, name) is getattr(importlib.import_module(home), name)


def documented(value: Any) -> bool:
    """Whether a value has a written docstring (dataclasses generate one)."""
    text = inspect.getdoc(value if inspect.ismodule(value) or callable(value) else type(value)) or ""
    return bool(text) and not text.startswith(f"{getattr(value, '__name__', '')}(")


@pytest.mark.parametrize("name", sorted(set(sitelens.__all__) - {"__version__"}))
def test_a_public_name_is_documented(name: str):
    value = getattr(sitelens, name)
    assert documented(value)
    if inspect.isclass(value) and value.__module__.startswith("sitelens"):
        public = {key: member for key, member in vars(value).items() if not key.startswith("_")}
        members = {key: getattr(member, "__func__", member) for key, member in public.items()}
        kinds = (property, functools.cached_property)
        assert [
            key
            for key, member in members.items()
            if (inspect.isfunction(member) or isinstance(member, kinds)) and not inspect.getdoc(member)
        ] == []


@pytest.mark.parametrize("module", ["sl", "figures", "heads", "studies"])
def test_the_program_of_a_user_whom_pyright_checks_uses_every_public_name(module: str):
    program = tree(ROOT / "tests" / "typing" / "face.py")
    used = {
        node.attr
        for node in ast.walk(program)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == module
    }
    names = set(sitelens.__all__) - {"__version__", *sitelens._SUBPACKAGES}
    if module != "sl":
        room = getattr(sitelens, module)
        names = {name for name, value in vars(room).items() if inspect.isfunction(value)}
    assert names - used == set()


def test_the_version_is_one():
    assert re.fullmatch(r"\d+\.\d+\.\d+", sitelens.__version__)
