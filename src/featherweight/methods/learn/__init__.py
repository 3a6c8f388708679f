"""What trainings share: the loop, and what it minimises."""
