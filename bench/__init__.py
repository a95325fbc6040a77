"""Measurements: `llmc bench` (chart), beside other systems (compare, peers), against the machine (decode, limits)."""
