"""Checks of arguments, values and file contents against type hints."""
