"""What the fault tests did, counted where it happens: `make test-faults` adds the lines up."""

import json
import os
from pathlib import Path

TALLY = "FAULTS_TALLY"  # environment: the file of counts; where it names one, the long sets run too
IS_LONG = TALLY in os.environ


def count(**figures: int) -> None:
    """Adds a line of counts to the file that TALLY names, if any; one write, so that processes may share it."""
    if IS_LONG:
        with Path(os.environ[TALLY]).open("a", encoding="utf-8") as file:
            file.write(json.dumps(figures) + "\n")
