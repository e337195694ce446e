"""From text to token rows: documents are cut into blocks, pairs stay whole, each text to classify is one row."""
