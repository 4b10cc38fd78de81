"""The command `pyfastcircuits`: from a model's name to the tables it shows and the files it writes."""

import sys

try:
    from pyfastcircuits.command import circuit, composition, heads, info, sweep, tables  # noqa: F401  # each adds its command
    from pyfastcircuits.command.app import app as app
except ImportError as error:
    sys.exit(f"the command needs the cli extra ({error}): pip install 'pyfastcircuits[cli]'")
