"""What holds on a model, checked against the raw network."""
