"""Healing: a compressed model is trained against its original, and stays as small as it is."""
