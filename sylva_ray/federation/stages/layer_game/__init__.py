"""Phase 2: a cooperative game over layers, and the benign refinement of the selected ones."""
