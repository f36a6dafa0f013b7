"""Checks of arguments, values and file contents against their type hints."""
