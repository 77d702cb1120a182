"""How fast: every stage beside its baselines and the machine's rooflines, every op, every switch."""
