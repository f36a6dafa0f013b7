"""Whole experiments: runs, comparisons, suites, the figures of figures/, and what is written of them."""
