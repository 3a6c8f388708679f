"""What is stored: codes of weights, checkpoints, and runs that keep what is done."""
