"""The command-line parser: options are written out, and a mistyped one is answered with the nearest."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from sitelens.files.escaping import visible
from sitelens.suggestions import did_you_mean


class Parser(argparse.ArgumentParser):
    """Takes no abbreviations (`--step` for `--steps`), and says below the usage what is wrong and what is near.

    Parsers of commands are of this class, too.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **options})

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """The options; anything unknown ends the program with exit code 2."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            (getattr(parsed, "parser", None) or self)._refuse(unknown)
        return parsed

    def error(self, message: str) -> NoReturn:
        """Usage, and the message in one line; exit code 2."""
        super().error(visible(message))

    def _refuse(self, unknown: Sequence[str]) -> NoReturn:
        word = next((word for word in unknown if word.startswith("-")), unknown[0]).partition("=")[0][:80]
        if not word.startswith("-"):
            self.error(f"{word!r} is one word too many")
        hint = did_you_mean(word, self._option_string_actions)
        self.error(f"there is no option {word!r}{f': {hint}' if hint else f'; `{self.prog} --help` lists them'}")
