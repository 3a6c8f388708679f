"""Training low-bit models: the loop, its text and state, and the folder that comes of it."""
