"""The command line: a file per group of commands; parses, calls, prints. No logic."""
