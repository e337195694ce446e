"""The embedded T5-shaped demo teacher (3.0 M parameters) and its tokenizer."""
