"""The `sitelens` command: the library's verbs from a shell."""

from sitelens.cli.command import main as main
