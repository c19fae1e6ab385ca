"""The data of health, metrics, the console and the status command."""
