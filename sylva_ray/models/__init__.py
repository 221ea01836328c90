"""Frozen backbones, stacks of adapters for many clients, and the formats that models are exported in."""
