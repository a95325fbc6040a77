"""Mixtures of experts on a CPU."""
