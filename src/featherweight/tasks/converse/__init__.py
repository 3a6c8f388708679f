"""Conversations that a model writes itself through its chat template: calibration text as people use models."""
