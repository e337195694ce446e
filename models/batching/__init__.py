"""Examples of many lengths in one forward pass: by length, padded or packed."""
