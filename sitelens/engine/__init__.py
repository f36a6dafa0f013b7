"""The fast path: prompts as tokens, one forward pass, shared prefixes, edits of heads."""
