"""What differs between families of models: wrapped text models, special tokens around texts, limits of positions."""
