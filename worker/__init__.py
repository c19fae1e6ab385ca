"""The queue, the worker that applies its jobs, Clerk's payloads and API, and monitoring."""
