"""Figures as pure functions from data to plotly dicts."""
