"""Making stacks: blocks of all layers in one order, measured on the true model."""
