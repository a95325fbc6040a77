"""Layers with a state on a CPU: convolutions and delta rules, and selective scans."""
