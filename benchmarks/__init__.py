"""Benchmarks: every figure is a ratio between two ways of doing the same work in one run (`make bench`)."""
