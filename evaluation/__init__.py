"""Scores of trained models, and reports that compare them."""
