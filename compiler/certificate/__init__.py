"""The parity certificate: what an artifact says, beside what the model says that it was made from."""
