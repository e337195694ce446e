"""The instruction tasks of the package, one YAML file each."""
