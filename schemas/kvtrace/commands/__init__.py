"""The verbs that need nothing but the trace itself."""
