"""Beyond the trained length: RoPE scaling, and reading in overlapping chunks."""
