"""Training low-bit layers: forward codes, backward rules, side paths, optimisers, schedules."""
