"""`python -m pyfastcircuits` is the command `pyfastcircuits`."""

from pyfastcircuits.command.cli import app

if __name__ == "__main__":
    app(prog_name="pyfastcircuits")
