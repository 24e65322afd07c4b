"""`python -m qpdiff`: the command line."""

import sys


def main() -> None:
    """Run the command line, or say what it needs."""
    try:
        from .cli import app
    except ImportError as error:
        print(f"the qpdiff command needs {error.name}: pip install 'qpdiff[cli]'", file=sys.stderr)
        sys.exit(2)
    app()


if __name__ == "__main__":
    main()
