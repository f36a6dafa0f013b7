"""Models: where weights and tokenizers come from, and what identifies a model."""
