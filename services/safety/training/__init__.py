"""Training and measuring the embedded safety models. Serving needs nothing from here."""
