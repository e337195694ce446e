"""Models and tokenizers: how they are loaded, identified, batched and taken apart at the output layer."""
