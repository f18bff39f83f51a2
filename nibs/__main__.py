"""`python -m nibs` and the console script `nibs`: the command line, or one sentence that says what it lacks.

The command line draws with click and rich, which nothing else in nibs may ask for; so they are missed here,
in words, and not as a traceback from an import.
"""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line; exits 2 where what it draws with is not installed."""
    try:
        from nibs.cli import nibs
    except ModuleNotFoundError as missing:
        if (missing.name or "").partition(".")[0] not in ("click", "rich"):
            raise
        sys.stderr.write(
            f"The nibs command draws with {missing.name}, which is missing here: pip install 'nibs[cli]'\n"
        )
        raise SystemExit(2) from None
    nibs(prog_name="nibs")


if __name__ == "__main__":
    main()
