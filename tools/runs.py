#!/usr/bin/env python
"""Run jepa_kit.tools.runs with the code of this clone, whether or not it is installed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jepa_kit.tools.runs import main

if __name__ == "__main__":
    sys.exit(main())
