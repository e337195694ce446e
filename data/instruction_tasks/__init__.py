"""Instruction tasks and GLUE: YAML files, templates, and mixtures of tasks."""
