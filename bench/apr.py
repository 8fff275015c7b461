"""What the checksum at the end of an APR file costs to check.

    python bench/apr.py [--mib 1024]

A file of that size is written into the temporary directory, with the checksum that belongs to it, and removed.
"""

from __future__ import annotations

import argparse
import os
import struct
import tempfile
import time
import zlib
from pathlib import Path

from engine.apr import require_whole


def main() -> None:
    """Prints processor and wall time of one check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=1024)
    mib: int = parser.parse_args().mib
    piece, checksum = os.urandom(1 << 20), 0
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model.apr"
        with path.open("wb") as file:
            for _ in range(mib):
                file.write(piece)
                checksum = zlib.crc32(piece, checksum)
            file.write(struct.pack("<I", checksum))
        wall, cpu = time.perf_counter(), time.process_time()
        require_whole(path)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    size = mib * (1 << 20) / 1e9
    print(f"{size:.2f} GB: {cpu:.2f} s of processor time, {wall:.2f} s; {cpu / size:.2f} s of processor time a GB")


if __name__ == "__main__":
    main()
