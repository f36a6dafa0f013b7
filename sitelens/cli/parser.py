"""The command-line parser: options cannot be abbreviated, and similar ones are suggested for unknown ones."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from sitelens.files.escaping import visible
from sitelens.suggestions import did_you_mean


class Parser(argparse.ArgumentParser):
    """An argument parser without abbreviations (`--n-step` for `--n-steps`) that suggests near options.

    The parsers of the commands (subparsers) are of this class as well.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **options})

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """The parsed options; an unknown word exits the program with code 2."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            (getattr(parsed, "parser", None) or self)._refuse(unknown)
        return parsed

    def error(self, message: str) -> NoReturn:
        """Print the usage and the message in one line, and exit with code 2."""
        super().error(visible(message))

    def _refuse(self, unknown: Sequence[str]) -> NoReturn:
        word = next((word for word in unknown if word.startswith("-")), unknown[0]).partition("=")[0][:80]
        if not word.startswith("-"):
            self.error(f"{word!r} is one word too many")
        hint = did_you_mean(word, self._option_string_actions)
        self.error(f"there is no option {word!r}{f': {hint}' if hint else f'; `{self.prog} --help` lists them'}")
