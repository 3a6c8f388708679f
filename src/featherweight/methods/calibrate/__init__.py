"""Calibration: what a network's layers see on real text, gathered block by block."""
