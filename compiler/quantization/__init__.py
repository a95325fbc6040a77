"""Weights as codes of 8 or 4 bits, fitted to the weights alone or to the inputs that they meet too."""
