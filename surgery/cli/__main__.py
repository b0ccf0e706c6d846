"""``python -m surgery.cli``, which is how launchers start the command."""

from __future__ import annotations

import sys

from surgery.cli import main

if __name__ == "__main__":
    sys.exit(main())
