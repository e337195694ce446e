"""Writing what a training made so that it is whole, found again, and not lost."""
