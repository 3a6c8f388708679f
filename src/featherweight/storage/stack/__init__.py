"""A model of any size in one folder: blocks in the order of their worth, of which every prefix is a model."""
