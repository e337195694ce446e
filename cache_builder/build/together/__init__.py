"""Several builders of one cache at once, on this machine or on a Ray cluster."""
