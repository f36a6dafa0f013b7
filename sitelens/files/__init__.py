"""Atomic writing, folders shared by processes, and escaping of text for every output."""
