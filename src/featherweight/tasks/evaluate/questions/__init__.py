"""Tasks with right and wrong answers: accuracies with intervals, and paired tests against the original's answers."""
