"""Chat templates: a conversation as the text that a model reads, and which of its tokens are scored."""
