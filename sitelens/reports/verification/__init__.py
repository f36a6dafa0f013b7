"""Verification of a model: the library's computations compared with the raw Hugging Face network."""
