"""Averages of client states: LoRA products, neighbourhoods and robust rules."""
