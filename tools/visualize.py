#!/usr/bin/env python
"""Run jepa_kit.tools.visualize in a clone, installed or not."""

import sys
from importlib.util import find_spec
from pathlib import Path

if find_spec("jepa_kit") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jepa_kit.tools.visualize import main

if __name__ == "__main__":
    sys.exit(main())
