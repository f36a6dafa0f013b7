"""What a command needs and writes: looked at before the work, and kept in the cache where it cannot be written."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from sitelens.errors import SitelensError
from sitelens.files.writing import check_file_name, check_folder
from sitelens.settings import settings


def look_first(options: argparse.Namespace) -> None:
    """Check the output folder, file names, formats and tools of a command, before anything is computed.

    A tool that only some files need is asked for in a note; all other files are made without it.

    Raises:
        SitelensError: if nothing could be written, or the model could not be loaded as asked.
    """
    if options.out is not None:
        check_folder(options.out)
        if getattr(options, "name", None) is not None:
            check_file_name(options.name, "--name")
        static = [name for name in dict.fromkeys(options.formats) if name != "html"]
        if static:
            from sitelens.figures import missing_tool

            problem = missing_tool(static)
            if problem is not None:
                print(
                    f"sitelens: note: {', '.join(static)} {problem}; all else is written", file=sys.stderr, flush=True
                )
    if getattr(options, "device", None) is not None or getattr(options, "device_map", None) is not None:
        from sitelens.models.sources import check_device

        check_device(options.device, options.device_map)
    if getattr(options, "quantize", None) is not None:
        from sitelens.models.quantization import check_quantization

        check_quantization(options.quantize)


@contextmanager
def kept(options: argparse.Namespace) -> Iterator[None]:
    """Around writing: an error says where the results are that were not written."""
    try:
        yield
    except SitelensError as error:
        raise SitelensError(
            f"{error}; what was computed is in the cache ({settings.cache()}): the same command with another --out "
            "writes it without computing it again"
        ) from error
