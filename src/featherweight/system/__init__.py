"""The machine: memory, threads, precision, and calls into libraries that raise what they like."""
