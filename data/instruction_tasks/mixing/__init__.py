"""Mixtures: which tasks a name stands for, and in which order their examples come."""
