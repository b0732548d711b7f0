"""The cluster on virtual time: the router's board and policies, schedulers and cache managers as they are; no model."""
