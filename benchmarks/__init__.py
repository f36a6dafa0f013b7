"""Benchmarks of speed and memory; every speed-up compares two ways of doing the same work in one run (`make bench`)."""
