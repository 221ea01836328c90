"""Types, seeds, errors and other helpers without dependencies on the rest of the package."""
