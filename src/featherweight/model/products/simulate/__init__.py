"""Integer models of hardware that is not here: what it computes, bit for bit, and what time it would take."""
