"""`llmc inspect --html`: one page about an artifact, made of its own facts; a section a module.

Plain HTML, CSS and SVG in one file: no scripts, nothing fetched, readable on a phone, in the dark, and on paper.
"""
