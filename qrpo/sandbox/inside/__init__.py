"""What runs inside the jail. It imports the standard library alone, and nothing of the project outside this folder."""
