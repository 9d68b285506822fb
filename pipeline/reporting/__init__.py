"""What people read after a run: one summary, a few plots."""
