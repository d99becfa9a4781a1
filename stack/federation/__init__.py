"""A federation of separate machines: a coordinator and silos, each with Flower's own processes."""
