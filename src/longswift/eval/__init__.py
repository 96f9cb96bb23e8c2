"""Measuring: attention alone, and models reading long documents; results are typed JSON."""
