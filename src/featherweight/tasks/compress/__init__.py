"""The streaming run: checkpoint in, compressed Hugging Face folder out, one tensor at a time, resumable."""
