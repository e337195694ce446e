"""Standard errors, significance tests and calibration."""
