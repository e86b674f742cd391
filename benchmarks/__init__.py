"""What is timed, against what; see README.md."""
