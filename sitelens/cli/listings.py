"""Commands that list tasks, models and the content of the cache, or clear the cache."""

from __future__ import annotations

import argparse

from sitelens.errors import SitelensError
from sitelens.settings import settings


def tasks(options: argparse.Namespace) -> None:
    from sitelens.tasks import list_tasks

    frame = list_tasks()
    if options.pattern:
        frame = frame[frame["name"].str.contains(options.pattern, regex=False)]
    if options.built_in:
        frame = frame[frame["source"] == "built in"]
    if frame.empty:
        raise SitelensError(f"no task has {options.pattern!r} in its name")
    if options.names:
        print("\n".join(frame["name"]))
        return
    shown = frame.drop(columns="source").assign(items=frame["items"].astype("string").fillna("?"))
    print(shown.to_string(index=False))
    print("\nOwn tasks: a .json file (a list of {input, output}) or a .csv file with these columns.")


def models(options: argparse.Namespace) -> None:
    from sitelens.models.catalogue import list_models

    print(list_models().drop(columns="download_command").to_string(index=False))
    print(
        "\nweights_gib: memory of the weights; prefix_kib: keys and values of a prompt token; prefix_tokens: how many\n"
        "of these --memory-budget holds. `hf download NAME` gets a model, after `hf auth login` where it is gated\n"
        "(Llama, Gemma). Also any other hub id (owner/name), a folder with a transformers model, or a .gguf file."
    )


def cache(options: argparse.Namespace) -> None:
    from sitelens.store.folder import default_store

    if options.models and options.clear is None:
        raise SitelensError("--models goes with --clear; without them, all that is cached is shown")
    if options.clear is not None:
        _clear(options.clear, options.models)
        return
    from sitelens.files.folders import leftovers, size_of
    from sitelens.models.gguf.converted import converted_models

    store, root = default_store(), settings.cache()
    entries = store.entries()
    print(f"artifacts in {store.root}\n")
    if options.verbose and len(entries):
        print(
            entries.assign(model=entries["model"].str[:12]).drop(columns="path").fillna("-").to_string(index=False)
            + "\n"
        )
    for kind, group in entries.groupby("kind"):
        print(f"{kind:<12} {len(group):>6} files  {_size(int(group['bytes'].sum()))}")
    models = converted_models()
    for folder in models:
        print(f"model        {folder.name}  {_size(size_of(folder.resolve()))}")
    data, unfinished = size_of(root / "data"), [*leftovers(root / "models"), *leftovers(root)]
    if data:
        print(f"data         downloaded files  {_size(data)}")
    if unfinished:
        size = sum(size_of(folder) for folder in unfinished)
        print(f"unfinished   {len(unfinished)} folders of runs that were killed  {_size(size)}; --clear removes them")
    if entries.empty and not models and not data and not unfinished:
        print("nothing yet")


def _clear(kind: str, models: bool) -> None:
    """Clear artifacts or models and the leftovers of killed runs; print what was removed and what remains."""
    from sitelens.files.folders import size_of, sweep
    from sitelens.models.gguf.converted import clear_models, converted_models
    from sitelens.store.folder import default_store

    store, root = default_store(), settings.cache()
    if kind != "models":
        before = size_of(store.root)
        removed = store.clear(None if kind == "all" else kind)
        print(f"removed {removed} artifacts ({_size(before - size_of(store.root))})")
    if swept := sweep(root / "models") + sweep(root):
        print(f"removed what runs that were killed had left ({_size(swept)})")
    if models or kind == "models":
        count, size, busy = clear_models()
        print(f"removed the converted models: {count} ({_size(size)})")
        for name in busy:
            print(f"{name} stays: another process is converting it, or it may not be removed")
    elif kind == "all" and (rest := converted_models()):
        size = sum(size_of(folder.resolve()) for folder in rest)
        print(f"the converted models stay: {len(rest)} ({_size(size)}); `sitelens cache --clear --models` removes them")


def _size(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
