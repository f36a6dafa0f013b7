"""Artifacts are read exactly as written or not at all, with concurrent processes and after any damage."""

from __future__ import annotations

import builtins
import errno
import json
import multiprocessing
import os
import random
import signal
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import safetensors.torch
import torch
from hypothesis import strategies as st
from torch import Tensor

from sitelens.errors import SitelensError, SitelensWarning
from sitelens.store import artifact as artifact_module
from sitelens.store.artifact import Artifact, DamagedArtifactError
from sitelens.store.digests import canonical_json, digest
from sitelens.store.folder import DAMAGED, Store, default_store, empty_cache

DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool,
]  # fmt: skip
SMALL = Artifact("embedding", {"task": 'é"\n', "n": 3}, {"z": torch.arange(3.0)}, {"model": "m"})
KILLED_ENTRIES = 3
LARGE = 200_000  # elements, so that a kill often interrupts a write

quick = hypothesis.settings(
    deadline=None, max_examples=60, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)  # the machine may be busy

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
objects = st.dictionaries(st.text(), plain, max_size=4)
kinds = st.text("abcdefghijklmnopqrstuvwxyz_-", min_size=1, max_size=12)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    raw = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    return torch.randint(0, 256, shape, generator=raw).to(draw(st.sampled_from(DTYPES)))


artifacts = st.builds(Artifact, kinds, objects, st.dictionaries(st.text(max_size=8), tensors(), max_size=3), objects)


def same(one: Artifact, other: Artifact | None) -> bool:
    return (
        other is not None
        and (one.kind, one.spec, one.meta) == (other.kind, other.spec, other.meta)
        and one.tensors.keys() == other.tensors.keys()
        and all(same_tensor(tensor, other.tensors[name]) for name, tensor in one.tensors.items())
    )


def same_tensor(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


def numbered(n: int, size: int = 64) -> Artifact:
    return Artifact("embedding", {"n": n}, {"z": torch.full((size,), float(n))}, {"task": f"task {n}"})


def stored(store: Store, artifact: Artifact) -> Path:
    """The path of an artifact, which the store must be able to write."""
    path = store.put(artifact)
    assert path is not None
    return path


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "artifacts")


@pytest.fixture(scope="module")
def workers() -> Any:
    """A multiprocessing context whose processes start with torch already imported, forked from a clean process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_store"])
    return context


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


# What is read equals what was written


@quick
@hypothesis.given(artifacts)
def test_an_artifact_comes_back_as_it_was_saved(artifact: Artifact):
    with tempfile.TemporaryDirectory() as folder:
        path = artifact.save(Path(folder) / "new" / "a.safetensors")
        assert same(Artifact.load(path), artifact)
        assert same(Artifact.load(path, artifact.kind), artifact)
        assert files(Path(folder)) == ["a.safetensors"]


@quick
@hypothesis.given(artifacts, objects)
def test_a_store_finds_an_artifact_by_its_spec_alone(artifact: Artifact, other: dict[str, Any]):
    hypothesis.assume(artifact.spec != other)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        assert store.get(artifact.kind, artifact.spec) is None
        assert store.put(artifact) == store.path(artifact.kind, artifact.spec)
        assert same(artifact, store.get(artifact.kind, json.loads(json.dumps(artifact.spec))))
        assert store.get(artifact.kind, other) is None


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8, torch.complex64, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (2, 3)], ids=str)
def test_every_dtype_and_shape_survives(store: Store, dtype: torch.dtype, shape: tuple[int, ...]):
    tensor = torch.arange(6).reshape(2, 3).to(dtype) if shape == (2, 3) else torch.zeros(shape, dtype=dtype)
    store.put(Artifact("k", {}, {"z": tensor}))
    found = store.get("k", {})
    assert found is not None
    assert found.tensors["z"].dtype == dtype and found.tensors["z"].shape == shape
    assert found.tensors["z"].tolist() == tensor.tolist()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(12.0).reshape(3, 4).T,
        torch.arange(12.0)[::3],
        torch.arange(4.0).expand(3, 4),
        torch.nn.Parameter(torch.arange(3.0)),
        torch.tensor([float("nan"), float("inf"), -0.0]),
    ],
    ids=["transposed", "strided", "expanded", "parameter", "not finite"],
)
def test_unusual_tensors_survive(store: Store, tensor: torch.Tensor):
    store.put(Artifact("k", {}, {"z": tensor}))
    found = store.get("k", {})
    assert found is not None and not found.tensors["z"].requires_grad
    assert torch.equal(found.tensors["z"].view(torch.int32), tensor.detach().contiguous().view(torch.int32))


def test_saving_again_replaces(tmp_path: Path):
    path = numbered(1).save(tmp_path / "a.safetensors")
    assert numbered(2).save(path) == path
    assert same(Artifact.load(path), numbered(2))


def test_loaded_tensors_outlive_their_file(tmp_path: Path):
    path = numbered(1).save(tmp_path / "a.safetensors")
    loaded = Artifact.load(path)
    numbered(2).save(path)
    path.unlink()
    assert same(loaded, numbered(1))


# Names


@quick
@hypothesis.given(kinds, kinds, objects, objects)
def test_two_specs_never_share_a_path(kind: str, other_kind: str, spec: dict[str, Any], other: dict[str, Any]):
    hypothesis.assume((kind, spec) != (other_kind, other))
    assert Store(Path("root")).path(kind, spec) != Store(Path("root")).path(other_kind, other)


@quick
@hypothesis.given(kinds, objects, st.randoms())
def test_the_order_of_a_spec_does_not_matter(kind: str, spec: dict[str, Any], rng: random.Random):
    names = list(spec)
    rng.shuffle(names)
    shuffled = {name: spec[name] for name in names}
    assert Store(Path("root")).path(kind, spec) == Store(Path("root")).path(kind, shuffled)


@pytest.mark.parametrize(
    ("one", "other"),
    [({"n": 1}, {"n": True}), ({"n": 1}, {"n": "1"}), ({"n": None}, {}), ({"n": [1, [2]]}, {"n": [[1], 2]})],
    ids=str,
)
def test_specs_of_different_types_differ(one: dict[str, Any], other: dict[str, Any]):
    assert digest(one) != digest(other)


def test_an_entry_is_named_by_kind_and_digest(store: Store):
    path = stored(store, numbered(1))
    assert path.parent == store.root / "embedding"
    assert path.suffix == ".safetensors" and len(path.stem) == 40 and set(path.stem) <= set("0123456789abcdef")


def test_the_default_store_lies_in_the_cache_folder(own_cache: Path):
    assert default_store().root == own_cache / "artifacts"


def test_a_spec_that_is_not_a_number_is_refused():
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json({"lr": float("nan")})


# Damage


@hypothesis.settings(quick, max_examples=200)
@hypothesis.given(artifacts, st.data())
def test_a_changed_byte_is_never_read_as_something_else(artifact: Artifact, data: st.DataObject):
    with tempfile.TemporaryDirectory() as folder:
        path = artifact.save(Path(folder) / "a.safetensors")
        content = bytearray(path.read_bytes())
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
        path.write_bytes(content)
        try:
            found = Artifact.load(path)
        except DamagedArtifactError:
            return
        assert same(found, artifact)  # the byte was white space that pads the header


def test_every_changed_byte_is_noticed(tmp_path: Path):
    path = SMALL.save(tmp_path / "a.safetensors")
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    padding = header - len(content[:header].rstrip(b" "))
    for place in (*range(header - padding), *range(header, len(content))):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(DamagedArtifactError, match=r"a\.safetensors"):
            Artifact.load(path)


def test_every_truncation_is_noticed(tmp_path: Path):
    path = SMALL.save(tmp_path / "a.safetensors")
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(DamagedArtifactError, match=r"a\.safetensors"):
            Artifact.load(path)


def test_appended_bytes_are_noticed(tmp_path: Path):
    path = SMALL.save(tmp_path / "a.safetensors")
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(DamagedArtifactError):
        Artifact.load(path)


def test_a_damaged_entry_is_named_removed_and_made_anew(store: Store):
    path = stored(store, numbered(1))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.warns(SitelensWarning, match=path.name) as caught:
        assert store.get("embedding", {"n": 1}) is None
    assert len(caught) == 1
    assert not path.exists()
    assert store.get("embedding", {"n": 1}) is None
    store.put(numbered(1))
    assert same(numbered(1), store.get("embedding", {"n": 1}))


def test_an_entry_under_another_name_is_noticed(store: Store):
    wrong = store.path("embedding", {"n": 2})
    stored(store, numbered(1)).rename(wrong)
    with pytest.warns(SitelensWarning, match="does not hold what its name says"):
        assert store.get("embedding", {"n": 2}) is None
    assert not wrong.exists()


def test_a_file_of_another_kind_is_named(tmp_path: Path):
    path = numbered(1).save(tmp_path / "a.safetensors")
    with pytest.raises(SitelensError, match=r"a\.safetensors holds a embedding, not a selection"):
        Artifact.load(path, "selection")


def test_a_file_of_a_newer_format_asks_for_an_upgrade(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as newer:
        newer.setattr(artifact_module, "FORMAT", artifact_module.FORMAT + 1)
        path = numbered(1).save(tmp_path / "a.safetensors")
    with pytest.raises(SitelensError, match=r"a\.safetensors was written by a newer sitelens .*upgrade") as caught:
        Artifact.load(path)
    assert not isinstance(caught.value, DamagedArtifactError)


def test_a_safetensors_file_of_others_is_refused(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"z": torch.zeros(2)}, path)
    with pytest.raises(DamagedArtifactError, match="not one of sitelens"):
        Artifact.load(path)


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(SitelensError, match=r"there is no file .*nothing\.safetensors"):
        Artifact.load(tmp_path / "nothing.safetensors")


def test_a_file_is_a_json_header_and_raw_numbers(tmp_path: Path):
    content = SMALL.save(tmp_path / "a.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert header.keys() == {"__metadata__", "z"}
    assert json.loads(header["__metadata__"]["sitelens"])["spec"] == SMALL.spec
    assert header["z"] == {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}
    assert content[8 + length :] == SMALL.tensors["z"].numpy().tobytes()  # nothing else: no pickle


# Unreadable files are not treated as damaged; failed writes lose nothing


def broken_open(monkeypatch: pytest.MonkeyPatch, error: int, mode: str = "r") -> None:
    """From now on, artifacts cannot be opened for reading ("r") or writing ("x")."""
    real = builtins.open

    def opened(file: Any, how: str = "r", *arguments: Any, **options: Any) -> Any:
        if mode in how and Path(str(file)).suffix in (".safetensors", ".tmp"):
            raise OSError(error, os.strerror(error), str(file))
        return real(file, how, *arguments, **options)

    monkeypatch.setattr(builtins, "open", opened)


@pytest.mark.parametrize("error", [errno.EACCES, errno.EIO, errno.ESTALE, errno.EMFILE], ids=os.strerror)
def test_an_artifact_that_cannot_be_read_is_left_as_it_is(store: Store, monkeypatch: pytest.MonkeyPatch, error: int):
    path = stored(store, numbered(1))
    with monkeypatch.context() as broken:
        broken_open(broken, error)
        with pytest.warns(SitelensWarning, match=f"cannot be read: {os.strerror(error)}.*continues without it") as said:
            assert [store.get("embedding", {"n": 1}) for _ in range(3)] == [None] * 3
        assert len(said) == 1
        with pytest.raises(SitelensError, match="cannot be read") as caught:
            Artifact.load(path)
        assert not isinstance(caught.value, DamagedArtifactError)
        assert store.entries()["kind"].tolist() == ["unreadable"]
        assert store.clear("damaged") == 0
    assert same(numbered(1), store.get("embedding", {"n": 1}))


def test_a_folder_in_an_artifacts_place_is_no_damage(store: Store):
    path = store.path("embedding", {"n": 1})
    path.mkdir(parents=True)
    with pytest.warns(SitelensWarning, match="it is a folder, not a file"):
        assert store.get("embedding", {"n": 1}) is None
    assert path.is_dir()


def test_a_file_is_read_once(store: Store, monkeypatch: pytest.MonkeyPatch):
    path, real, opened = stored(store, numbered(1)), builtins.open, []
    monkeypatch.setattr(builtins, "open", lambda file, *rest, **more: opened.append(file) or real(file, *rest, **more))
    assert same(numbered(1), store.get("embedding", {"n": 1}))
    assert opened == [path]


def test_a_good_artifact_that_takes_a_damaged_ones_place_just_then_stays(store: Store, monkeypatch: pytest.MonkeyPatch):
    path = stored(store, numbered(1))
    good, replace = path.read_bytes(), os.replace
    path.write_bytes(good[:-1])

    def replaced(source: Any, target: Any) -> None:
        if str(target).endswith(DAMAGED):
            path.write_bytes(good)  # another process replaces the file first
        replace(source, target)

    with monkeypatch.context() as raced:
        raced.setattr(os, "replace", replaced)
        with pytest.warns(SitelensWarning, match="computed again"):
            assert store.get("embedding", {"n": 1}) is None
    assert files(store.root) == [path.name]
    assert same(numbered(1), store.get("embedding", {"n": 1}))


def test_a_damaged_artifact_goes_when_the_new_one_is_whole(store: Store):
    path = stored(store, numbered(1))
    path.write_bytes(b"rubbish")
    with pytest.warns(SitelensWarning, match="computed again"):
        store.get("embedding", {"n": 1})
    assert files(store.root) == [path.with_suffix(DAMAGED).name]
    assert store.entries()["kind"].tolist() == ["damaged"]
    store.put(numbered(1))
    assert files(store.root) == [path.name]


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT], ids=os.strerror)
def test_a_store_that_cannot_be_written_says_so_once(store: Store, monkeypatch: pytest.MonkeyPatch, error: int):
    store.put(numbered(1))
    broken_open(monkeypatch, error, "x")
    with pytest.warns(SitelensWarning, match=f"cannot be stored in the cache .*{os.strerror(error)}") as said:
        assert store.put(numbered(2)) is None and store.put(numbered(3)) is None
    assert len(said) == 1 and len(files(store.root)) == 1


def test_a_full_disk_leaves_no_half_file(store: Store, monkeypatch: pytest.MonkeyPatch):
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.warns(SitelensWarning, match="No space left"):
        assert store.put(numbered(1)) is None
    assert files(store.root) == []


def test_a_file_where_the_cache_should_be_costs_nothing(tmp_path: Path):
    (tmp_path / "cache").write_text("mine")
    with pytest.warns(SitelensWarning, match="cannot be stored in the cache"):
        assert Store(tmp_path / "cache" / "artifacts").put(numbered(1)) is None
    assert Store(tmp_path / "cache" / "artifacts").get("embedding", {"n": 1}) is None


@pytest.mark.parametrize("there", [True, False], ids=["a link", "a dangling link"])
def test_a_store_behind_a_link_works(tmp_path: Path, there: bool):
    if there:
        (tmp_path / "disk").mkdir()
    (tmp_path / "artifacts").symlink_to(tmp_path / "disk")
    store = Store(tmp_path / "artifacts")
    store.put(numbered(1))
    assert same(numbered(1), store.get("embedding", {"n": 1})) and (tmp_path / "disk" / "embedding").is_dir()


def test_permissions_follow_the_umask(store: Store):
    before = os.umask(0o002)
    try:
        path = stored(store, numbered(1))
    finally:
        os.umask(before)
    assert path is not None
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o664, 0o775)


# Writing is all or nothing


@pytest.mark.parametrize("step", ["replace", "fsync"])
def test_a_failing_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str):
    def fail(*_: object) -> None:
        raise OSError("disk full")

    path = numbered(1).save(tmp_path / "a.safetensors")
    monkeypatch.setattr(os, step, fail)
    for target in (path, tmp_path / "b.safetensors"):
        with pytest.raises(OSError, match="disk full"):
            numbered(2).save(target)
    assert files(tmp_path) == ["a.safetensors"]
    assert same(Artifact.load(path), numbered(1))


def test_threads_that_write_and_read_at_once_see_whole_artifacts(store: Store):
    failures: list[object] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(15):
            n = rng.randrange(3)
            store.put(numbered(n))
            found = store.get("embedding", {"n": n})
            if not same(numbered(n), found):
                failures.append(found)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(files(store.root)) == 3


def put_many(root: Path, rounds: int) -> None:
    for i in range(rounds):
        Store(root).put(numbered(i % KILLED_ENTRIES, LARGE))


def put_for_ever(root: Path) -> None:
    while True:
        put_many(root, 1000)


def test_processes_that_write_at_once_leave_whole_artifacts(store: Store, workers: Any):
    writers = [workers.Process(target=put_many, args=(store.root, 12)) for _ in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * 4
    assert len(files(store.root)) == KILLED_ENTRIES
    for n in range(KILLED_ENTRIES):
        assert same(numbered(n, LARGE), store.get("embedding", {"n": n}))


def test_a_killed_writer_leaves_nothing_half_written(store: Store, workers: Any):
    rng = random.Random(0)
    for _ in range(12):
        writer = workers.Process(target=put_for_ever, args=(store.root,))
        writer.start()
        while not list(store.root.glob("*/*.safetensors")):
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.05))
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        found = [store.get("embedding", {"n": n}) for n in range(KILLED_ENTRIES)]  # a damaged one would warn
        assert any(found)
        assert all(same(numbered(n, LARGE), artifact) for n, artifact in enumerate(found) if artifact)
    for temporary in store.root.glob("*/.*.tmp"):
        os.utime(temporary, (0, 0))
    store.clear()
    assert files(store.root) == []


# Listing and clearing


def test_entries_lists_what_is_there(store: Store):
    assert store.entries().empty and list(store.entries()) == ["kind", "task", "model", "bytes", "modified", "path"]
    path = stored(store, Artifact("selection", {"model": "abc"}, {"a": torch.zeros(2)}, {"task": "antonym"}))
    store.put(numbered(1))
    stored(store, numbered(2)).write_bytes(b"rubbish")
    rows = store.entries().set_index("kind").sort_index()
    assert list(rows.index) == ["damaged", "embedding", "selection"]
    assert [rows[name]["selection"] for name in ("task", "model", "bytes", "path")] == [
        "antonym", "abc", path.stat().st_size, str(path),
    ]  # fmt: skip
    assert rows.loc["embedding", "task"] == "task 1"
    assert abs(rows["modified"]["selection"].timestamp() - path.stat().st_mtime) <= 0.5


@hypothesis.settings(quick, max_examples=100)
@hypothesis.given(st.data())
def test_entries_bears_any_changed_byte(data: st.DataObject):
    with tempfile.TemporaryDirectory() as folder:
        path = stored(Store(Path(folder)), SMALL)
        content = bytearray(path.read_bytes())
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
        path.write_bytes(content)
        assert Store(Path(folder)).entries()["path"].tolist() == [str(path)]


def test_clear_removes_one_kind_or_all_and_counts(store: Store):
    assert store.clear() == 0
    for n in range(3):
        store.put(numbered(n))
    store.put(Artifact("selection", {}, {}))
    assert store.clear("selection") == 1
    assert store.entries()["kind"].tolist() == ["embedding"] * 3
    assert store.clear() == 3
    assert store.entries().empty


def test_clear_damaged_removes_damaged_files_only(store: Store):
    store.put(numbered(1))
    broken = stored(store, numbered(2))
    broken.write_bytes(b"rubbish")
    assert store.clear("damaged") == 1
    assert store.entries()["kind"].tolist() == ["embedding"] and not broken.exists()


def test_clear_removes_stale_temporaries_but_not_those_being_written(store: Store):
    folder = stored(store, numbered(1)).parent
    stale, fresh = folder / ".a.1-0.tmp", folder / ".a.2-0.tmp"
    for temporary in (stale, fresh):
        temporary.write_bytes(b"half")
    os.utime(stale, (0, 0))
    assert store.clear() == 1
    assert files(store.root) == [fresh.name]


def test_clear_touches_nothing_of_others(store: Store):
    store.put(numbered(1))
    (store.root / "embedding" / "notes.txt").write_text("mine")
    (store.root / "top.safetensors").write_text("mine")
    store.clear()
    assert files(store.root) == ["notes.txt", "top.safetensors"]


def test_tensors_that_share_memory_are_saved(tmp_path: Path) -> None:
    tensor = torch.arange(6.0)
    artifact = Artifact("kind", {}, {"a": tensor, "b": tensor[2:], "c": tensor.reshape(2, 3).T})
    found = Artifact.load(artifact.save(tmp_path / "shared.safetensors")).tensors
    assert all(torch.equal(found[name], kept) for name, kept in artifact.tensors.items())


# cached


def contents(n: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return {"z": torch.tensor([float(n)])}, {"task": f"task {n}"}


def number(artifact: Artifact) -> int:
    if "z" not in artifact.tensors:
        raise SitelensError(f"{artifact.where} holds no number")
    return int(artifact.tensors["z"])


def test_what_is_cached_is_made_once(store: Store):
    calls: list[int] = []

    def make() -> Any:
        calls.append(3)
        return contents(3)

    assert [store.cached("embedding", {"n": 3}, make, number) for _ in range(3)] == [3, 3, 3]
    assert calls == [3]
    assert store.get("embedding", {"n": 3}).meta == {"task": "task 3"}


def test_what_cannot_be_read_back_is_made_again(store: Store):
    store.put(Artifact("embedding", {"n": 3}, {}))
    with pytest.warns(SitelensWarning, match="holds no number; it is computed again"):
        assert store.cached("embedding", {"n": 3}, lambda: contents(3), number) == 3
    assert number(store.get("embedding", {"n": 3})) == 3


def test_of_many_only_the_missing_are_made_in_any_order_and_each_is_stored_at_once(store: Store):
    store.put(Artifact("embedding", {"n": 1}, *contents(1)))
    asked: list[list[int]] = []

    def make(missing: list[int]) -> Any:
        asked.append(missing)
        for n in reversed(missing):
            yield n, contents(n)
            assert number(store.get("embedding", {"n": n})) == n

    specs = [{"n": n} for n in range(4)]
    for _ in range(2):
        assert store.cached_all("embedding", specs, make, [number] * 4) == [0, 1, 2, 3]
    assert asked == [[0, 2, 3]]


def test_what_was_made_before_an_error_is_kept(store: Store):
    def make(missing: list[int]) -> Any:
        yield 0, contents(0)
        raise SitelensError("no more")

    with pytest.raises(SitelensError, match="no more"):
        store.cached_all("embedding", [{"n": 0}, {"n": 1}], make, [number] * 2)
    assert number(store.get("embedding", {"n": 0})) == 0 and store.get("embedding", {"n": 1}) is None


def test_the_cache_is_empty_for_a_block(store: Store):
    default_store().put(numbered(1))
    with empty_cache():
        assert default_store().get("embedding", {"n": 1}) is None
        default_store().put(numbered(2))
    assert same(numbered(1), default_store().get("embedding", {"n": 1}))
    assert default_store().get("embedding", {"n": 2}) is None
