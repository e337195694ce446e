"""What readers of a cache have in common: their protocol, decoding of rows, and their representation as text and HTML."""
