"""The `sitelens` command-line program."""

from sitelens.cli.command import main as main
