"""Run the command line with ``python -m sylva_ray``."""

from sylva_ray.cli.app import main

if __name__ == "__main__":
    main()
