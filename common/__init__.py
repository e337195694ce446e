"""Small things that every room uses: errors, settings, whole files, sizes, memory."""
