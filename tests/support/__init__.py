"""Support code that several test modules share, one module per area."""
