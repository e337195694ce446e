"""Sequence classifiers: a language model's backbone, the state of the last token, a linear head."""
