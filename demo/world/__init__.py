"""The demo world: data, models and training of the small text-to-image checkpoint the demo runs on."""
