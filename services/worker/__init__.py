"""What prefill and decode workers have in common: the gRPC process around an engine."""
