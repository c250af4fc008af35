"""`python -m pipeline` is the command `graphhash`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; without click, which the extras bring, say so."""
    try:
        from pipeline.cli.main import main as run
    except ModuleNotFoundError as error:
        from pipeline.extras import remedy

        text = remedy(error)
        if text is None:
            raise
        sys.exit(f"graphhash: error: {text}")
    run()


if __name__ == "__main__":
    main()
