"""The demo: a task, its reward and its configuration."""
