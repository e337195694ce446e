"""The tables of the reference systems in their own form, and those that a user writes as a file."""
