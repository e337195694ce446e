"""How rows become stored arrays: array specifications, codecs of log-probabilities, Parquet within bounds."""
