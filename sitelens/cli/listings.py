"""Commands that list: tasks, models, and what the cache holds."""

from __future__ import annotations

import argparse

from sitelens.defaults import SitelensError, settings


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
    from sitelens.catalogue import list_models

    print(list_models().drop(columns="get").to_string(index=False))
    print(
        "\nweights_gib: memory of the weights; prefix_kib: keys and values of a prompt token; prefix_tokens: how many\n"
        "of these --memory-budget holds. `hf download NAME` gets a model, after `hf auth login` where it is gated\n"
        "(Llama, Gemma). Also any other hub id (owner/name), a folder with a transformers model, or a .gguf file."
    )


def cache(options: argparse.Namespace) -> None:
    import shutil

    from sitelens.store import default_store

    store, models = default_store(), settings.cache() / "models"
    entries = store.entries()
    if options.clear is not None:
        kind = None if options.clear == "all" else options.clear
        print(f"removed {store.clear(kind)} artifacts")
        if options.clear in ("all", "models") and models.exists():
            shutil.rmtree(models)
            print("removed the converted models")
        return
    print(f"artifacts in {store.root}\n")
    if options.verbose and len(entries):
        print(
            entries.assign(model=entries["model"].str[:12]).drop(columns="path").fillna("-").to_string(index=False)
            + "\n"
        )
    for kind, group in entries.groupby("kind"):
        print(f"{kind:<12} {len(group):>6} files  {_size(int(group['bytes'].sum()))}")
    for folder in sorted(models.glob("gguf-*/")):
        size = sum(file.stat().st_size for file in folder.iterdir())
        print(f"model        {folder.name}  {_size(size)}")
    if entries.empty and not models.exists():
        print("nothing yet")


def _size(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
