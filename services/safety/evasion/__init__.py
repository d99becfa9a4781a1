"""Undoing the tricks that hide a request from a classifier; ``readings.readings`` is the way in."""
