"""What the keeper of a contained process is started with: `python -P -s -S -B start.pyc`.

This file and the modules that it takes are compiled into the scratch directory (`sandbox_process.Scratch`), so
that no start compiles anything and nothing else of this package is there.
"""

import sys

place = __file__.rpartition("/")[0]
sys.path.append(place)
from engine.sandbox_keeper import main  # noqa: E402

sys.path.remove(place)
main()
