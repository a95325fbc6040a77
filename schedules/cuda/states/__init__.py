"""Layers with a state on a GPU: convolutions and delta rules, and selective scans."""
