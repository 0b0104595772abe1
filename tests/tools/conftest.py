"""tools/ is no package: its benchmarks are imported as bench.py imports them."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "tools"))
