"""What `kd eval --tasks` can measure, one module per task."""
