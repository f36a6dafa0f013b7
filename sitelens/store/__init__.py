"""Artifacts on disk: content-addressed, checksummed, written whole; and the one get-or-make, `cached`."""
