"""Where checkpoints are kept: one small interface (``interface``), and what is behind it (``opening`` chooses)."""
