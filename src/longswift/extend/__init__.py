"""Positions beyond the trained length: the mathematics of RoPE scaling."""
