"""Distillation losses by row and by group, and their hand-written gradients."""
