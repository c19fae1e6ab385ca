"""What the tables hold beside what Clerk's API says. Reads only."""
