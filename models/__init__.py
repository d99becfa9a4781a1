"""The weights that Fedward ships: data files only."""
