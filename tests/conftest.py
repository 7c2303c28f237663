"""Lets tests import what they share: `toy`, `pretend_cuda`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
