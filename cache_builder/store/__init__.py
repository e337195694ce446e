"""The cache format: what a shard holds, how it is coded, committed and read."""
