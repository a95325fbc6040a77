"""Linear layers on a CPU: a rule for each way in which weights are multiplied, and the loops of each."""
