"""Output files of a command: checked before the computation, with a helpful error if they cannot be written."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from sitelens.errors import SitelensError
from sitelens.files.writing import check_file_name, check_folder
from sitelens.settings import settings


def look_first(options: argparse.Namespace) -> None:
    """Check the output folder, file names, formats, device and quantization of a command before it computes.

    If a tool is missing that only some file formats need, a note says so; all other files are written.

    Raises:
        SitelensError: if the folder cannot be written to, a file name is invalid, or the device or quantization is not
            available.
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
    """A context manager for writing results; an error inside also says that the results are in the cache."""
    try:
        yield
    except SitelensError as error:
        raise SitelensError(
            f"{error}; what was computed is in the cache ({settings.cache()}): the same command with another --out "
            "writes it without computing it again"
        ) from error
