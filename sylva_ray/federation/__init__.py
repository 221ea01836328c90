"""The contract of a method, the loop over its stages, and what both ends of a run do in them."""
