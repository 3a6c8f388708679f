"""The axes of quantisation: transforms, grids, rounding, corrections."""
