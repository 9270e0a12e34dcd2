"""UnHype: LoRA from a hypernetwork, conditioned on the prompt, for concept erasure."""
