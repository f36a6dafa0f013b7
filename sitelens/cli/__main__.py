"""So that `python -m sitelens.cli` is the command, too."""

import sys

from sitelens.cli import main

sys.exit(main())
