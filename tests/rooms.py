"""Tests stand in the rooms of what they test; imported, this lets them take from one another wherever they stand."""

import sys
from pathlib import Path

sys.path += [str(room) for room in sorted(Path(__file__).parent.iterdir()) if room.is_dir() and str(room) not in sys.path]
