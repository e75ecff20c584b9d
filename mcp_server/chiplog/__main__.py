"""`python -m chiplog` is the command `chiplog`. Its imports take most of a second, in which Ctrl-C may come too."""

import sys


def main() -> None:
    """Runs the command line."""
    try:
        from chiplog.cli import main as run

        run()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
