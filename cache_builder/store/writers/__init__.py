"""What builders write: shards, claims on shards, and the answers of a teacher that generates."""
