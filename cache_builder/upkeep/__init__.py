"""Care of finished caches: verify, repair, slice, merge, summarise and list them."""
