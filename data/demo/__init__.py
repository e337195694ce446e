"""The embedded texts of the demo and the tests: no files, no network."""
