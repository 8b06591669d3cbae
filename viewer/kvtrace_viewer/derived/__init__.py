"""What is computed from a trace for the viewer: tiles, thumbnails, sinks and heavy hitters."""
