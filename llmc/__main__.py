"""`python -m llmc`: the command, of the interpreter that is asked."""

from llmc.cli.main import main

if __name__ == "__main__":
    main(prog_name="llmc")
