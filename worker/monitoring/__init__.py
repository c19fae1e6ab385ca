"""What health, metrics, the console and the status command show."""
