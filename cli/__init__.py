"""The `llmc` command: one subcommand a file."""
