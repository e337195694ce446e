"""What the disk holds and what it refuses: digests of folders, and failed writes in words."""
