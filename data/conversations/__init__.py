"""Conversations: messages with roles, read from the columns in which the field's data sets hold them."""
