"""Build into an object store: shards are staged on this disk and put whole; claims and commits are conditional writes."""
