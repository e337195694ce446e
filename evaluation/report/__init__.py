"""`kd report`: runs and evaluations become tables, pictures and one HTML page."""
