"""The command `clerk-sync`, also as `python -m clerk_sync`: the only module whose name is the project's own.

The others have common names (`config`, `db`, `web`). The folder of this file goes first on the path, so that
neither PYTHONPATH nor the working directory puts modules of the same names in their place.
"""

import sys
from pathlib import Path


def main() -> None:
    """Run the command that the arguments name."""
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    try:
        from cli.main import main as run  # noqa: PLC0415 - found only now

        run()
    except KeyboardInterrupt:  # during the imports, which are most of the start
        sys.exit("clerk-sync: stopped")


if __name__ == "__main__":
    main()
