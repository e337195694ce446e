"""How many micro-batches an epoch has, without walking along it."""
