"""Measures of how much hangs on each layer, each one file; `feather fit --sensitivity NAME` takes one of them."""
