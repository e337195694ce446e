"""Copy caches between machines: push, pull, and read from a URL."""
