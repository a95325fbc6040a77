"""From a transformers configuration to the graph of the whole sequence.  Importing it imports torch: seconds."""

from llmc.compiler.frontend.export.exporter import export_graph

__all__ = ["export_graph"]
