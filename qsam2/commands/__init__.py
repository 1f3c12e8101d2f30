"""One module a command: its flags, its help, and what it calls. Nothing heavy is imported before a command runs."""
