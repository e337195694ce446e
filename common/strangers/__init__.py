"""Read what strangers may have written: plain files, YAML within bounds, templates without format strings."""
