"""Train UnHype hypernetworks."""
