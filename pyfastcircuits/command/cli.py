"""The command `pyfastcircuits`: from a model's name to the tables it shows and the files it writes."""

import sys

try:
    from pyfastcircuits.command import (  # noqa: F401  # each adds its command
        circuit,
        composition,
        heads,
        info,
        page,
        plan,
        sweep,
        tables,
    )
    from pyfastcircuits.command.app import app as app
except ImportError as error:
    sys.exit(f"the command needs the cli extra ({error}): pip install 'pyfastcircuits[cli]'")
