"""The autoregressive stage: a Qwen3 decoder that writes the discrete image tokens."""
