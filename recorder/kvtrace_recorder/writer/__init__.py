"""The writing side of a recording: its own process, fed through shared memory."""
