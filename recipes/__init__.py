"""Recipes and experiments: YAML files that become `kd` commands, and the demo."""
