"""Evaluation: scores of tasks under conditions, their statistics, and results as tables and files."""
