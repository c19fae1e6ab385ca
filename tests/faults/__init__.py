"""Whatever dies, nothing is lost: real processes, real signals, and servers that break in every way."""
