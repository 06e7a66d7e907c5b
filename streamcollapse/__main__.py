"""The program: ``streamcollapse``, or ``python -m streamcollapse``."""

from streamcollapse.cli.signals import end_at_once


def main() -> None:
    """Entry point of the console script."""
    end_at_once()  # importing what follows takes a while
    from streamcollapse.cli.main import app

    app()


if __name__ == "__main__":
    main()
