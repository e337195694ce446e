"""What a cache says of itself: manifest, commits, shard records and the identity that follows from them."""
