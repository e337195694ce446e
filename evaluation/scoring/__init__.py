"""Log-probabilities of text under a model, in batches."""
