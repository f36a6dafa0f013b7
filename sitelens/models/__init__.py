"""Models: loading weights and tokenizers, and identifying a model by its contents."""
