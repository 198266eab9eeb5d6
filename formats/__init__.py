"""What only export.py and foreign checkpoints need."""
