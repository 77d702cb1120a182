"""How fast: every stage beside its peers and the machine's ceilings, every op, every switch."""
