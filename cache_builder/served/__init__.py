"""Teachers that an inference engine runs: token ids go in, the log-probabilities of the k most probable tokens come out."""
