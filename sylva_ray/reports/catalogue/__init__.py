"""What this package has to offer, for ``sylva-ray list`` and ``show``: entries by kind, settings, and schemas."""
