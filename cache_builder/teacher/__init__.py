"""The teacher pass: from a batch of text to the top-k logits, normalisers and tail that are kept."""
