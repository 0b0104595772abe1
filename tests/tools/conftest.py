"""tools/ is not a package: import its modules as its commands do."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "tools"))
