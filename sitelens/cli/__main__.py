"""Entry point of `python -m sitelens.cli`."""

import sys

from sitelens.cli import main

sys.exit(main())
