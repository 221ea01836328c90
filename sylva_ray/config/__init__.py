"""Configuration: its sections, reading and validation."""
