"""Forward passes: tokenized prompts, cached prefixes, head edits, decoding, memory and cache keys."""
