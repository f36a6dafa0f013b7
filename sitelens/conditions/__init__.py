"""Conditions: what a task is evaluated under, and what they are made of."""
