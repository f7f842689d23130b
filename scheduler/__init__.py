"""Time: what is read when, and who waits for what. Joins `prefetch` and `device`."""
