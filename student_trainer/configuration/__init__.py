"""The settings of a training run, by what they belong to."""
