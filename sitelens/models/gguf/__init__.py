"""GGUF files, packaged or the user's own, converted once to folders of safetensors that load in seconds."""
