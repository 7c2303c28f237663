"""The space of deep models, small enough to read in an evening."""
