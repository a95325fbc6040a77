"""Other systems, each in a process of its own that speaks protocol.py."""
