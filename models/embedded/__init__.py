"""The embedded GPT-2-shaped demo teacher (2.7 M parameters) and its tokenizer."""
