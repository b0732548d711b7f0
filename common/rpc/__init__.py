"""gRPC in one place: codec, status, server bootstrap, calls with deadlines, membership."""
