"""The experiments of the package, one YAML file each."""
