"""Measurements of a model in memory: functions of model, tokenizer and text."""
