# SPDX-License-Identifier: Apache-2.0
"""The start of an example. Torch takes seconds to import: a Ctrl-C then is one line too."""

import importlib
import sys
from typing import NoReturn


def launch(name: str) -> NoReturn:
    """Run the command line of an example, its module `command`; exits with its status."""
    try:
        command = importlib.import_module(f"{name}.command")
    except KeyboardInterrupt:
        print(f"{name}: stopped before there was anything to save", file=sys.stderr)
        sys.exit(130)
    sys.exit(command.main())
