"""What is in a folder: inspection, verification, distributions of levels."""
