"""The front door: a model's files in, a graph with unread weights out."""

from llmc.compiler.frontend.source import SourceModel, load_source

__all__ = ["SourceModel", "load_source"]
