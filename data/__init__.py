"""Text: where it comes from, and how it becomes examples and token blocks."""
