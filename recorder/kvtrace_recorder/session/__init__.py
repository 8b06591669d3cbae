"""A recording: what it knows of the model while it runs."""
