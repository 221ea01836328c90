"""``python -m sylva_ray``: the command line."""

from sylva_ray.cli.app import main

if __name__ == "__main__":
    main()
