"""What scripts/export.py is made of."""
