"""Look into a cache: its texts with every token's distribution, the rows that stand out, and figures of all rows."""
