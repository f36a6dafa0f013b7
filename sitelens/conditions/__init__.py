"""Conditions under which a task is evaluated, and the task embeddings and head selections that they use."""
