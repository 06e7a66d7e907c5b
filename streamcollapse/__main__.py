"""The program: ``streamcollapse``, or ``python -m streamcollapse``."""

from streamcollapse.cli.signals import end_at_once, leave_quickly


def main() -> None:
    """Entry point of the console script."""
    end_at_once()  # importing what follows takes a while
    from streamcollapse.cli.main import app

    try:
        app()
    finally:
        leave_quickly()


if __name__ == "__main__":
    main()
