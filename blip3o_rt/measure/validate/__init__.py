"""Proof that every op, every stage and the whole pipeline compute what the published model computes."""
