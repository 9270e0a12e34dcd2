"""The demo: a small trained text-to-image world, and the full erasure run on it."""
