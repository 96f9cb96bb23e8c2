"""``longswift`` and ``python -m longswift``: Ctrl-C is one line while the commands load, too."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line."""
    try:
        from longswift.cli.main import main as run
    except KeyboardInterrupt:
        print("longswift: interrupted.", file=sys.stderr)
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
