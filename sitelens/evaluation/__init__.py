"""Scores of tasks under conditions, and statistics of them."""
