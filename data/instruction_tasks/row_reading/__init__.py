"""A row of a data set as it was written: its columns, and the rules that turn one of them into text."""
