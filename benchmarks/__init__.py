"""Measurements that the documentation quotes. Each module says what it prints; none is imported by the package."""
