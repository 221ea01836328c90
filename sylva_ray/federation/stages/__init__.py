"""The stages that a run can be made of."""
