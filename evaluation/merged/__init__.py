"""Scores of merged classifiers on GLUE, and sweeps over the scaling."""
