"""Ways to run a student's layers faster: compiled by torch, or with Liger's kernels."""
