"""tools/ and tools/experiments/ are not packages: import their modules as their commands do."""

import sys
from pathlib import Path

TOOLS = Path(__file__).parents[2] / "tools"
sys.path += [str(TOOLS), str(TOOLS / "experiments")]
