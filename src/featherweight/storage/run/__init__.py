"""A run: a folder that keeps what is finished, a log of events, what is ours to replace."""
