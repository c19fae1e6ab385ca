"""The receiver: a delivery is verified, put on the queue, and answered."""
